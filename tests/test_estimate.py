"""estimate_memory and largest_batch: what a step is measured to need, without running it."""

import copy
import gc
import importlib
import re
import weakref

import pytest
import timm
import torch
import torchvision
from estimate_accuracy import compare, measured_peak
from fold_cost import Branches
from support import compiled, randomise
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.resnet import BasicBlock

import convbn_compile as cb
from convbn_compile.measure import saved_for_backward

largest = importlib.import_module("convbn_compile.largest_batch")  # the name is the function's in the package
estimate_module = importlib.import_module("convbn_compile.estimate")


def block(inputs, outputs):
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]


def small():
    return randomise(nn.Sequential(*block(3, 8), nn.MaxPool2d(2), *block(8, 4)))


def mobilenet():
    """One block with squeeze-excitation and hard-swish."""
    return torchvision.models.mobilenetv3.InvertedResidual(
        InvertedResidualConfig(8, 3, 16, 8, True, "HS", 1, 1, 1.0), nn.BatchNorm2d
    )


NETS = {
    "resnet": lambda: BasicBlock(8, 8),
    "mobilenet": mobilenet,
    "densenet": lambda: torchvision.models.densenet._DenseBlock(2, 8, 2, 8, 0.0),
    "convnext": lambda: timm.models.convnext.ConvNeXtBlock(8, ls_init_value=1.0),
    "branches": lambda: Branches(8),
}
SETTINGS = [
    *((name, {}) for name in NETS),
    ("resnet", {"mode": "eval"}),
    ("resnet", {"memory_budget": 0.5}),
]


@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=str)
def test_estimates_are_what_is_measured(name, options):
    net = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), NETS[name](), nn.ReLU(), nn.AvgPool2d(2)))
    row = compare(net, torch.randn(2, 3, 32, 32), **options)
    assert row["saved, estimated"] == pytest.approx(row["saved, measured"], rel=0.02)
    assert row["peak, estimated"] == pytest.approx(row["peak, measured"], rel=0.01)


def test_by_hand():
    """Saved is where ReLU let through, a bit for each number; at the peak there are the output, its gradient, and the
    bits as 32-bit numbers and as booleans.
    """
    net = randomise(nn.Sequential(nn.Conv2d(1, 104, 1, bias=False), nn.BatchNorm2d(104), nn.ReLU()))
    estimate = cb.estimate_memory(net, torch.empty(1000, 1, 10, 10, device="meta"))
    numbers = 1000 * 104 * 10 * 10
    assert estimate.saved_bytes == numbers // 8
    assert estimate.to_dict() == {
        "saved_bytes": numbers // 8,
        "peak_bytes": estimate.peak_bytes,
        "parameter_bytes": 4 * 312,
        "buffer_bytes": 4 * 208 + 8,
        "input_bytes": 4 * 1000 * 10 * 10,
        "gradient_bytes": 4 * 312,
    }
    assert estimate.peak_bytes == pytest.approx(numbers * (1 / 8 + 1 + 3 * 4), rel=0.01)
    assert str(estimate).splitlines()[2].split() == ["saved", "1.24"]


def test_far_more_than_fits_into_memory_and_on_every_kind_of_tensor():
    net, shape = small(), (10**7, 3, 64, 64)
    wanted = cb.estimate_memory(net, torch.empty(shape, device="meta"))
    masks, pooled, indices = (8 * 64**2 + 4 * 32**2) // 8, 4 * 8 * 32**2, 8 * 32**2
    assert wanted.saved_bytes == 10**7 * (masks + pooled + indices)
    assert wanted.input_bytes == 10**7 * 4 * 3 * 64**2
    with FakeTensorMode():
        fake = torch.empty(shape)
    assert cb.estimate_memory(copy.deepcopy(net).to("meta"), fake) == wanted


@pytest.mark.parametrize("mode", ["tune", "deploy"])
def test_without_gradients_nothing_is_saved(mode):
    """But Deploy keeps the folded weights and biases."""
    net, x = small(), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        estimate = cb.estimate_memory(net, x, mode=mode)
        measured = measured_peak(compiled(net, mode=mode), net, x)
    kept = 4 * (8 * 27 + 8 + 4 * 72 + 4) if mode == "deploy" else 0
    assert estimate.peak_bytes == pytest.approx(measured + kept, abs=64)
    assert (estimate.saved_bytes, estimate.gradient_bytes) == (0, 0)


def test_deploy_computes_no_gradients_where_grad_mode_is_on():
    assert cb.estimate_memory(small(), torch.randn(4, 3, 8, 8), mode="deploy").saved_bytes == 0


def test_batch_statistics_and_autocast():
    net, x = small(), torch.randn(4, 3, 16, 16)
    net[1].train()
    with torch.autocast("cpu", torch.bfloat16):
        estimate = cb.estimate_memory(net, x)
        assert estimate.saved_bytes == saved_for_backward(compiled(net), net, x)


def test_the_model_is_left_as_it_was():
    net = cb.turn_on(small(), lowering="aot_eager")
    net[1].train()
    before, x = copy.deepcopy(net.state_dict()), torch.randn(2, 3, 8, 8, requires_grad=True)
    cb.estimate_memory(net, x)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(type(tensor) is nn.Parameter and tensor.grad is None for tensor in net.parameters())
    assert x.grad is None
    with pytest.raises(ValueError, match="already compiled"):
        cb.turn_on(net)


def test_torch_keeps_nothing_of_it(monkeypatch):
    graphs, live_bytes = [], estimate_module.live_bytes

    def seen(lowered):
        graphs.append(weakref.ref(lowered.forward))
        return live_bytes(lowered)

    monkeypatch.setattr(estimate_module, "live_bytes", seen)
    cb.estimate_memory(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8))
    gc.collect()
    assert [graph() for graph in graphs] == [None]


@pytest.mark.parametrize(
    ("inputs", "kwargs", "message"),
    [
        (
            (torch.zeros(2, 4, 8, 8),),
            {},
            "RuntimeError: Given groups=1, weight of size [8, 3, 3, 3], expected input[2, 4",
        ),
        ((torch.zeros(2, 3, 8, 8).double(),), {}, "RuntimeError: Input type (double) and bias type (float)"),
        ((), {}, "missing 1 required positional argument: 'input'"),
        ((torch.zeros(2, 3, 8, 8),), {"images": 1}, "got an unexpected keyword argument 'images'"),
    ],
)
def test_inputs_that_the_model_does_not_take(inputs, kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        cb.estimate_memory(small(), *inputs, **kwargs)
    assert str(caught.value).startswith("estimate_memory cannot call Sequential with these inputs: ")


class DependsOnValues(nn.Module):
    def forward(self, x):
        return x[x > 0].sum()


class Breaks(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


class Uncopied(nn.Conv2d):
    def __deepcopy__(self, memo):
        raise TypeError("no copies")


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            Breaks,
            {},
            "estimate_memory needs a model that Dynamo captures as one graph with fake tensors, which have no ",
        ),
        (DependsOnValues, {}, "which have no values; DependsOnValues it does not: aten.nonzero.default"),
        (
            lambda: Uncopied(3, 4, 3),
            {},
            "but Uncopied or what it is called with cannot be copied (copy.deepcopy): no c",
        ),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), {}, "but 0.weight is lazy: call the model once before."),
        (small, {"memory_budget": 2}, "memory_budget must be a number in (0, 1], or 'pointwise'"),
        (
            small,
            {"memory_budget": 0.5, "options": {"memory_budget": 1.0}},
            "memory_budget is given twice: 0.5, and 1.0 in options. Give one.",
        ),
        (small, {"mode": "tunes"}, "Unknown mode 'tunes'. Did you mean 'tune'?"),
        (small, {"options": {"foldd": "auto"}}, "Unknown option: 'foldd'"),
    ],
)
def test_errors(make, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cb.estimate_memory(make(), torch.randn(2, 3, 8, 8), **options)


def test_autocast_on_meta():
    message = "estimate_memory was called under autocast, which does nothing to tensors on meta, where the model"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=message):
        cb.estimate_memory(small().to("meta"), torch.empty(2, 3, 8, 8, device="meta"))


def test_no_module():
    with pytest.raises(
        TypeError, match=re.escape("options must be a dict such as {'merge_branches': False}, got [1].")
    ):
        cb.estimate_memory(small(), torch.zeros(1, 3, 8, 8), options=[1])
    with pytest.raises(TypeError, match=re.escape("estimate_memory needs a torch.nn.Module, got 1 (int).")):
        cb.estimate_memory(1)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, images, scales, *, shift):
        return self.norm(self.convolution(images)).relu() * scales.view(-1, 1, 1, 1) + shift


def test_the_largest_batch_fits_and_the_next_does_not(monkeypatch):
    peaks = {}

    def estimate(model, images, scales, **kwargs):
        found = cb.estimate_memory(model, images, scales, **kwargs)
        assert images.shape[1:] == (3, 32, 32) and scales.shape == images.shape[:1]
        peaks[len(images)] = found.peak_bytes
        return found

    monkeypatch.setattr(largest, "estimate_memory", estimate)
    example = (torch.empty(2, 3, 32, 32), torch.empty(2))
    found = cb.largest_batch(TwoInputs().eval(), example, 10**9, shift=torch.zeros(8, 1, 1))
    assert peaks[found] <= 10**9 < peaks[found + 1]
    assert len(peaks) == 4


def test_no_batch_fits():
    with pytest.raises(ValueError, match="No batch fits into budget_bytes=10: a batch of 1 takes 11 bytes"):
        largest._search(lambda batch: 10 + batch, 8, 10)


@pytest.mark.parametrize("begin", [1, 7, 1000])
@pytest.mark.parametrize("budget", [15, 10**3, 10**9])
def test_the_search_finds_it_in_few_steps_also_if_bytes_grow_faster_later(begin, budget):
    lines = [(0, 12), (3, 12), (5, -1000), (50, -(10**6))]
    tried = []

    def bytes_at(batch):
        tried.append(batch)
        return max(slope * batch + fixed for slope, fixed in lines)

    found = largest._search(bytes_at, begin, budget)
    assert bytes_at(found) <= budget < bytes_at(found + 1)
    assert len(tried) <= 14
    assert min(tried) >= 1


@pytest.mark.parametrize(
    ("bytes_at", "most"),
    [
        (lambda batch: max(5000, 3 * batch), 12),
        (lambda batch: 64 * (batch // 64 + 1), 30),
        (lambda batch: batch + 10**7 * (batch > 3000), 30),
        (lambda batch: batch**3, 30),
    ],
    ids=["plateau", "steps", "jump", "cubic"],
)
@pytest.mark.parametrize("begin", [1, 10, 5000])
def test_the_search_where_bytes_are_no_line(bytes_at, most, begin):
    tried = []

    def counting(batch):
        tried.append(batch)
        return bytes_at(batch)

    found = largest._search(counting, begin, 10**5)
    assert bytes_at(found) <= 10**5 < bytes_at(found + 1)
    assert len(tried) <= most


@pytest.mark.parametrize(
    ("example", "budget", "error", "message"),
    [
        (torch.zeros(2, 3, 8, 8), 1.5, TypeError, "budget_bytes must be an int, got 1.5 (float)."),
        ((), 1, ValueError, "example must begin with a tensor whose dim 0 is the batch, got no tensor."),
        (torch.zeros(()), 1, ValueError, "whose dim 0 is the batch, got one of shape ()."),
    ],
)
def test_errors_of_largest_batch(example, budget, error, message):
    with pytest.raises(error, match=re.escape(message)):
        cb.largest_batch(small(), example, budget)


def test_bytes_that_do_not_grow():
    with pytest.raises(
        ValueError, match=re.escape("The bytes do not grow with the batch, dim 0 of the example: 5 for 1")
    ):
        largest._search(lambda batch: 5, 1, 10)

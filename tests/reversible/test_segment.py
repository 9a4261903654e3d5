"""What a block's second run must not change: statistics, random numbers, autocast, gradients; and what is saved."""

import contextlib
import copy
import gc

import pytest
import torch
import torchvision
from reversible.nets import Residual, chain_of, image, make
from torch import nn
from torchvision.models import resnet

from convbn_compile.measure import saved_for_backward
from convbn_compile.reversible import _chain, make_reversible
from convbn_compile.reversible._replay import RandomState


def both(net, **arguments):
    """A reversible network, and the same one under ordinary autograd."""
    twin = copy.deepcopy(net)
    handle, ordinary = make_reversible(net, **arguments), make_reversible(twin, **arguments)
    ordinary.ordinary = True
    return handle, net, twin


def step(net, x, seed=1):
    """Gradients of one backward."""
    net.zero_grad()
    torch.manual_seed(seed)
    net(x).square().sum().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def assert_alike(found, wanted, tolerance=1e-9):
    assert found.keys() == wanted.keys()
    largest = max(gradient.abs().max() for gradient in wanted.values() if gradient is not None)
    for name, gradient in wanted.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            assert (found[name] - gradient).abs().max() <= tolerance * largest, name


def test_running_statistics_are_updated_once():
    _, net, twin = both(make("torchvision ResNet").train(), alpha=0.3, beta=0.7)
    x = image()
    assert_alike(step(net, x), step(twin, x))
    for (name, buffer), other in zip(net.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    assert net.layer2[1].bn1.num_batches_tracked == 1
    assert net.layer2[1].bn1.track_running_stats


@pytest.mark.parametrize("name", ["torchvision ViT", "torchvision ConvNeXt", "timm bottlenecks", "timm ViT"])
def test_dropout_and_drop_path_draw_the_same_numbers(name):
    _, net, twin = both(make(name).train(), alpha=0.3, beta=0.7)
    x = image(batch=4)
    found, after = step(net, x), torch.rand(3)
    assert_alike(found, step(twin, x))
    assert torch.equal(torch.rand(3), after)  # the generator goes on where ordinary training leaves it


def test_random_numbers_do_matter(monkeypatch):
    """The mutant of the test above: a second run that draws numbers of its own."""
    _, net, twin = both(make("torchvision ViT").train(), alpha=0.3, beta=0.7)
    monkeypatch.setattr(RandomState, "again", lambda self: contextlib.nullcontext())
    x = image()
    with pytest.raises(AssertionError):
        assert_alike(step(net, x), step(twin, x))


@pytest.mark.parametrize("frozen", ["stem", "first blocks", "all blocks", "weights of norms"])
def test_frozen_parts(frozen):
    net = make("torchvision ResNet")
    parts = {
        "stem": [net.conv1, net.bn1, net.layer1, net.layer2[0]],
        "first blocks": [net.conv1, net.bn1, net.layer1, net.layer2, net.layer3[0], net.layer3[1]],
        "all blocks": [net.layer2, net.layer3],
        "weights of norms": [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)],
    }
    for part in parts[frozen]:
        part.requires_grad_(requires_grad=False)
    _, net, twin = both(net)
    x = image()
    assert_alike(step(net, x), step(twin, x))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_chain_that_needs_no_backward_keeps_nothing(frozen, monkeypatch):
    net = make("torchvision ResNet").requires_grad_(not frozen)
    make_reversible(net)
    monkeypatch.setattr(_chain, "run_reversible", None)
    with torch.set_grad_enabled(frozen):
        assert not net(image()).requires_grad


def test_gradients_add_up_over_batches():
    _, net, twin = both(make("torchvision ResNet"))
    for model in (net, twin):
        torch.manual_seed(3)
        for _ in range(2):
            model(image()).sum().backward()
    assert_alike(*({name: p.grad for name, p in model.named_parameters()} for model in (net, twin)))


def test_gradients_of_the_input_and_of_chosen_parameters():
    _, net, twin = both(make("torchvision bottlenecks"))
    x = image().requires_grad_()
    of = [torch.autograd.grad(model(x).sum(), [x, model.layer3[2].conv2.weight]) for model in (net, twin)]
    for found, wanted in zip(*of, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_backward_has_the_coefficients_of_its_forward():
    handle, net, twin = both(make("torchvision ResNet"))
    x = image()
    output = net(x)
    handle.set(0.0, 1.0)
    output.square().sum().backward()
    assert_alike({name: p.grad for name, p in net.named_parameters()}, step(twin, x))


def test_hooks_of_parameters_run_once():
    _, net, twin = both(make("torchvision ResNet"))
    calls = []
    for model in (net, twin):
        model.layer3[1].conv1.weight.register_hook(lambda gradient: calls.append(1) or 2 * gradient)
    x = image()
    assert_alike(step(net, x), step(twin, x))
    assert len(calls) == 2


def test_weights_that_are_written_to_before_backward():
    """As autograd has it."""
    _, net, _ = both(make("torchvision ResNet"))
    loss = net(image()).sum()
    with torch.no_grad():
        net.layer3[1].conv1.weight.add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_that_are_given():
    """torch.func.functional_call: backward computes again with what forward had."""
    _, net, twin = both(make("torchvision ResNet"))
    x, given = image(), [{}, {}]
    for model, tensors in zip((net, twin), given, strict=True):
        for name, parameter in model.named_parameters():
            tensors[name] = (1.1 * parameter.detach()).requires_grad_()
        torch.func.functional_call(model, tensors, x).square().sum().backward()
    assert_alike(*({name: tensor.grad for name, tensor in tensors.items()} for tensors in given))


def test_modes_that_change_before_backward():
    """Backward computes again in the mode of forward."""
    _, net, twin = both(make("torchvision ResNet").train())
    x = image()
    for model in (net, twin):
        loss = model(x).square().sum()
        model.eval()
        loss.backward()
        assert not model.training and not model.layer3[1].bn1.training
    assert_alike(*({name: p.grad for name, p in model.named_parameters()} for model in (net, twin)))


def test_what_requires_grad_may_change_before_backward():
    _, net, twin = both(make("torchvision ResNet"))
    x = image()
    loss = net(x).square().sum()
    net.layer3[1].requires_grad_(requires_grad=False)
    loss.backward()
    found, wanted = {name: p.grad for name, p in net.named_parameters()}, step(twin, x)
    assert_alike(*({name: grad for name, grad in each.items() if "layer3.1" not in name} for each in (found, wanted)))


def test_statistics_of_instance_norm():
    def norm():
        return nn.InstanceNorm1d(3, affine=True, track_running_stats=True)

    net = nn.Sequential(*(Residual(nn.Sequential(nn.Conv1d(3, 3, 1), norm())) for _ in range(3))).double()
    _, net, twin = both(net, alpha=0.3, beta=0.7, chains=[""])
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    assert_alike(step(net, x), step(twin, x))
    for found, wanted in zip(net.buffers(), twin.buffers(), strict=True):
        assert torch.equal(found, wanted)


def test_spectral_norm_in_training_is_refused_whenever_it_comes():
    net = nn.Sequential(*(Residual(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))) for _ in range(2)))
    make_reversible(net.eval(), chains=[""])
    x = torch.randn(4, 3)
    net(x).sum().backward()
    with pytest.raises(ValueError, match="0 writes to its buffer f.parametrizations.weight.0._u"):
        net.train()(x)


def test_a_buffer_that_is_replaced():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return x + self.mean

    net = nn.Sequential(Mean(), Mean())
    make_reversible(net, chains=[""])
    with pytest.raises(ValueError, match="0 writes to its buffer mean"):
        net(torch.randn(4, 3, requires_grad=True))


def test_a_block_that_is_wider_than_the_streams():
    class Scaled(Residual):
        def __init__(self):
            super().__init__(nn.Linear(3, 3))
            self.gamma = nn.Parameter(torch.rand(3, dtype=torch.float64))

        def forward(self, x):
            return x + self.gamma * self.f(x)

    handle = make_reversible(nn.Sequential(Scaled(), Scaled(), Scaled()), 0.3, 0.7, chains=[""])
    assert handle.gradient_error(torch.randn(4, 3)) < 1e-5


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_devices(device):
    with torch.device(device):
        net = nn.Sequential(*(Residual(nn.Linear(3, 3)) for _ in range(3)))
        make_reversible(net, 0.3, 0.7, chains=[""])
        net(torch.randn(4, 3)).sum().backward()
    assert net[0].f.weight.grad.device.type == device


def test_no_second_derivatives():
    net = make("torchvision ResNet")
    make_reversible(net)
    with pytest.raises(RuntimeError, match="A reversible chain has no second derivative, which create_graph=True"):
        torch.autograd.grad(net(image()).sum(), net.layer3[1].conv1.weight, create_graph=True)
    blocks = chain_of(4)
    make_reversible(blocks, chains=[""])
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.functional.hessian(lambda x: blocks(x).sum(), torch.randn(1, 6, dtype=torch.float64))


def test_statistics_that_are_written_to_before_backward():
    net = make("torchvision ResNet")
    make_reversible(net)
    loss = net(image()).sum()
    net.layer3[2].bn1.running_var.mul_(3)
    with pytest.raises(RuntimeError, match=r"The buffer bn1.running_var of layer3\.2, .* was written to between"):
        loss.backward()


def test_what_is_trained_and_no_parameter_of_a_block():
    class Shared(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.layer, self.hidden = nn.Linear(3, 3), [bias]

        def forward(self, x):
            return x + self.layer(x) + self.hidden[0]

    bias = nn.Parameter(torch.randn(3))
    net = nn.Sequential(Shared(bias), Shared(bias))
    make_reversible(net, chains=[""])
    with pytest.raises(RuntimeError, match="1, a block of a reversible chain, reads something that requires grad"):
        net(torch.randn(2, 3)).sum().backward()
    bias.requires_grad_(requires_grad=False)
    net(torch.randn(2, 3)).sum().backward()


def test_restored_before_backward():
    net = make("torchvision ResNet")
    handle = make_reversible(net)
    loss = net(image()).sum()
    handle.restore()
    with pytest.raises(RuntimeError, match="restore\\(\\) was called between forward and backward"):
        loss.backward()


def test_frozen_parameters_stay_what_they_are():
    """Such as quantised ones, of a class of their own, with attributes."""
    net = chain_of(2)
    for block in net:
        block.f[1].weight.requires_grad_(requires_grad=False).scale = 2.0
        block.f[1].forward = lambda x, layer=block.f[1]: x @ layer.weight.T * layer.weight.scale
    _, net, twin = both(net, chains=[""])
    x = torch.randn(2, 6, dtype=torch.float64)
    net(x).sum().backward()
    assert net[0].f[3].weight.grad is not None


def test_a_backward_inside_of_autocast_leaves_no_casts_behind():
    net = chain_of(2).float()
    make_reversible(net, chains=[""])
    x, parameters = torch.randn(2, 6), []
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            net(x).float().sum().backward()
            parameters.append(sum(type(each) is nn.Parameter for each in gc.get_objects()))
    assert parameters[2] <= parameters[1]  # casts of copies of parameters would hold those


def test_autocast_has_float32_streams():
    """An anchor after every block, so that bfloat16 inside of blocks costs no more than it does in eager."""
    handle, net, twin = both(make("torchvision ResNet").float())
    x = image().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert handle.lengths(handle._chains[1], torch.float32, low_precision=True) == [1, 1, 1]
        assert net(x).dtype == twin(x).dtype
        outputs = [model(x).float().square().sum() for model in (net, twin)]
    for output in outputs:
        output.backward()  # outside of autocast, as it should be
    found, wanted = ({name: p.grad for name, p in model.named_parameters()} for model in (net, twin))
    assert_alike(found, wanted, tolerance=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_is_warned_of(dtype):
    net = make("torchvision ResNet").to(dtype)
    with pytest.warns(UserWarning, match=f"1 F in a row at alpha = 1, beta = 0.125 in {dtype} predict"):
        make_reversible(net)
    net(image().to(dtype))


def test_a_schedule_is_warned_of_once():
    """But again where the error grows much larger."""
    net = chain_of(4).float()
    with pytest.warns(UserWarning, match="beta = 0.04 in torch.float32 predict"):
        handle = make_reversible(net, chains=[""], beta=0.04, anchor_every=None)
    for beta in (0.05, 0.03):
        handle.set(1.0, beta)
        net(torch.randn(5, 6))
    with pytest.warns(UserWarning, match=r"beta = 0\.01"):
        handle.set(1.0, 0.01)


# --- saved for backward ------------------------------------------------------------------------------------------


def saved(net, x):
    return saved_for_backward(net, net, x)


def test_saved_bytes_do_not_grow_with_depth():
    x = torch.randn(5, 6, dtype=torch.float64)
    found = []
    for count in (4, 8, 16, 32):
        net = chain_of(count)
        make_reversible(net, chains=[""], anchor_every=None, alpha=0.3, beta=0.7)
        found.append(saved(net, x))
    assert found == [2 * x.numel() * 8] * 4


def test_an_anchor_is_one_pair_of_streams():
    x, net = torch.randn(5, 6, dtype=torch.float64), chain_of(8)
    make_reversible(net, chains=[""], anchor_every=3)
    assert saved(net, x) == 5 * x.numel() * 8  # the last two blocks of 8 keep their inputs, of which one is kept anyway


def test_a_single_block_saves_its_input():
    x, net = torch.randn(5, 6, dtype=torch.float64), chain_of(8)
    make_reversible(net, chains=[""], anchor_every=1)
    assert saved(net, x) == 7 * x.numel() * 8  # the first one's is the model's


SHARES = [
    ({"anchor_every": None}, 0.13),
    ({"alpha": 0.3, "beta": 0.7}, 0.15),
    ({}, 0.37),  # at the start each block keeps its input
]


@pytest.mark.parametrize(("arguments", "share"), SHARES, ids=str)
@pytest.mark.filterwarnings("ignore:make_reversible.* predict a relative error")
def test_resnet_152_stage_3(arguments, share):
    """With its transition block, which stays as it is and takes 0.11."""
    stage = torchvision.models.resnet152().layer3.eval()
    x = torch.randn(1, 512, 8, 8)
    ordinary = saved(stage, x)
    make_reversible(stage, **arguments)
    assert saved(stage, x) <= share * ordinary


def test_a_resnet_under_autocast_saves_half():
    """Streams in float32, of which each block keeps one, beside activations in bfloat16."""
    net = nn.Sequential(*(resnet.Bottleneck(64, 16) for _ in range(5))).eval()
    x = torch.randn(2, 64, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        full = saved(net, x)
        make_reversible(net, chains=[""])
        assert saved(net, x) < full / 2

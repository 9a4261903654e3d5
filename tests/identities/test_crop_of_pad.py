"""The statement of crop_of_pad, bit for bit; its matches on joint graphs; near-misses; what it saves."""

import pytest
import torch
import torch.nn.functional as F
from support import assert_as_eager, compiled, joint_graph, operators, randomise
from test_backend import double
from torch import nn

from convbn_compile import joint_pass
from convbn_compile.identities import crop_of_pad as identity
from convbn_compile.measure import saved_for_backward

PADS = [(1, 1), (0, 1), (2, 0), (0, 0), (0, 1, 2, 0), (1, 1, 1, 1), (0, 2, 0, 0, 3, 1)]


@pytest.mark.parametrize("pad", PADS, ids=str)
def test_statement(pad):
    x = torch.randn(2, 3, 5, 4, 6)
    x[0, 0, 0, 0, 0] = torch.nan
    torch.testing.assert_close(identity.after(x, pad), identity.before(x, pad), rtol=0, atol=0, equal_nan=True)


def test_mutant_fails():
    """Pads counted from the first dimension."""
    x = torch.randn(2, 3, 5)
    assert identity.crop(F.pad(x, (0, 1, 2, 0)), (2, 0, 0, 1)).shape != x.shape


class Padded(nn.Module):
    """Convolutions with "same" padding of their own, as TensorFlow's networks have them."""

    def __init__(self, activation, pad=(0, 1, 1, 0), *, also_unpadded=False, frozen=False):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.unpadded = nn.Conv2d(4, 4, 1) if also_unpadded else None
        self.activation, self.pad = activation, pad
        randomise(self.double())
        self.second.requires_grad_(not frozen)

    def forward(self, x):
        x = self.activation(self.norms[0](self.first(x)))
        y = self.norms[1](self.second(F.pad(x, self.pad)))
        return y if self.unpadded is None else y.sum() + self.unpadded(x).sum()


def slices(model):
    module = joint_graph(model, double(2, 4, 8, 8))
    joint_pass.run(module.graph)
    return operators(module.graph).get("aten.slice.Tensor", 0)


ACTIVATIONS = [nn.ReLU6(), nn.ReLU(), nn.ReLU(inplace=True), nn.Hardtanh(-1, 2), nn.Sigmoid(), nn.Tanh()]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_backward_reads_the_copy(activation):
    model = Padded(activation)
    assert slices(model) == 2
    assert_as_eager(model, double(2, 4, 8, 8), folded=2)


def test_what_is_saved():
    """The input of the second convolution and nothing else: no second copy, no mask."""
    x = double(2, 4, 8, 8)
    for activation in ACTIVATIONS:
        model = Padded(activation)
        assert saved_for_backward(compiled(model), model, x) == 2 * 4 * 9 * 9 * 8


@pytest.mark.parametrize("pad", [(-1, -1, -1, -1), (-1, 0, 0, 0), (0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("activation", [nn.ReLU6(), nn.Identity()], ids=str)
def test_the_gradient_of_a_crop_is_a_pad_in_backward(activation, pad):
    """Found by the zoo: mobilenet_v2 of transformers pads by 0."""

    class Cropped(Padded):
        def forward(self, x):
            x = F.pad(self.norms[0](self.first(F.pad(activation(x), pad))), pad)
            return self.norms[1](self.second(activation(x)))

    assert_as_eager(Cropped(activation), double(2, 4, 8, 8), folded=2)


@pytest.mark.parametrize(
    "model",
    [
        Padded(nn.ReLU6(), (0, 1, -1, 3)),
        Padded(nn.ReLU6(), also_unpadded=True),
        Padded(nn.SiLU()),
        Padded(nn.Identity()),
    ],
    ids=["negative pad", "a convolution keeps the original", "backward reads something else", "backward reads nothing"],
)
def test_near_misses(model):
    assert slices(model) == 0
    assert_as_eager(model, double(2, 4, 8, 8), folded=2)


def test_a_copy_that_no_convolution_keeps_is_left_alone():
    def padded(x):
        return F.pad(x.relu(), (1, 1)).sum(0)

    module = joint_graph(padded, double(2, 4))
    joint_pass.run(module.graph)
    assert "aten.slice.Tensor" not in operators(module.graph)


def test_dynamic_shapes():
    model = Padded(nn.ReLU6())
    tuned = torch.compile(model, backend="convbn_tune", dynamic=True, options={"lowering": "aot_eager"})
    for size in (8, 5):
        x = double(size, 4, 6 + size, 9)
        torch.testing.assert_close(tuned(x), model(x))


class Permuted(nn.Module):
    """What is padded lies otherwise in memory than the copy, and a view of its gradient follows."""

    def __init__(self, activation):
        super().__init__()
        self.linear, self.activation, self.convolution = nn.Linear(4, 336), activation, nn.Conv2d(6, 5, 3)

    def forward(self, x):
        y = self.activation(self.linear(x).view(-1, 8, 6, 7).permute(0, 2, 3, 1))
        return self.convolution(F.pad(y, (1, 1, 1, 1)))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ELU()], ids=str)
def test_gradients_that_lie_otherwise_in_memory_are_reshaped(activation):
    assert_as_eager(randomise(Permuted(activation)).double(), double(2, 4))

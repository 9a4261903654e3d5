"""The statement of mask_of_clamp, bit for bit; its matches on joint graphs; near-misses; what it saves."""

import pytest
import torch
from support import assert_as_eager, compiled, joint_graph, operators, randomise
from test_backend import double
from torch import nn

from convbn_compile import joint_pass
from convbn_compile.identities import mask_of_clamp as identity
from convbn_compile.measure import saved_for_backward

SPECIAL = torch.tensor([0.0, -0.0, 6.0, -1.0, 7.0, float("nan"), float("inf"), -float("inf"), 1e-45, 6.0000005])
BOUNDS = [(0.0, 6.0), (-1.0, 1.0), (0, 1), (-float("inf"), 0.0), (-2.5, float("inf"))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("lower", "upper"), BOUNDS)
def test_statement(lower, upper, dtype):
    x = torch.cat([SPECIAL, torch.randn(1000) * 4]).to(dtype)
    assert torch.equal(identity.after(x, lower, upper), identity.before(x, lower, upper))


def test_mutant_fails(monkeypatch):
    """With strict comparisons the bounds themselves would pass."""
    strict = lambda z, lower, upper: (z < lower) | (z > upper)  # noqa: E731
    x = torch.cat([SPECIAL, torch.randn(1000) * 4])
    assert not torch.equal(strict(x.clamp(0, 6), 0, 6), identity.before(x, 0, 6))


def net(activation):
    layers = [[nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), activation] for _ in range(3)]
    return randomise(nn.Sequential(*(layer for block in layers for layer in block)).double())


def comparisons_of(graph):
    return [node.args[0] for node in graph.nodes if str(node.target) in ("aten.le.Scalar", "aten.ge.Scalar")]


@pytest.mark.parametrize("activation", [nn.ReLU6(), nn.ReLU6(inplace=True), nn.Hardtanh(-1, 2)], ids=str)
def test_the_mask_reads_the_output(activation):
    module = joint_graph(net(activation), double(2, 4, 8, 8))
    before = operators(module.graph)
    joint_pass.run(module.graph)
    assert len(comparisons_of(module.graph)) == 6
    of_output = [node for node in comparisons_of(module.graph) if "clamp_max" in str(node.target)]
    assert len(of_output) == 4  # no convolution keeps the last output
    assert operators(module.graph)["aten.le.Scalar"] == before["aten.le.Scalar"]
    assert_as_eager(net(activation), double(2, 4, 8, 8))


def test_what_is_saved():
    """Two of the three outputs, which convolutions read; of the last, which none does, a mask of bits."""
    model, x = net(nn.ReLU6()), double(2, 4, 8, 8)
    elements = 2 * 4 * 8 * 8
    assert saved_for_backward(compiled(model), model, x) == 2 * elements * 8 + elements // 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("lower", "upper", "applies"), [(0.0, 6.0, True), (-1.0, 1.0, True), (0.0, 0.3, False)])
def test_16_bits(lower, upper, applies, dtype):
    """The activation is computed in float32; what is kept of it has 16 bits, and has to have the bounds."""

    def model(x, weight):
        return nn.functional.hardtanh(x * 2, lower, upper) @ weight

    x, weight = (torch.randn(64, 64).to(dtype).requires_grad_() for _ in range(2))
    module = joint_graph(model, x, weight)
    joint_pass.run(module.graph)
    read = {node.meta["val"].dtype for node in comparisons_of(module.graph)}
    assert read == {dtype if applies else torch.float32}
    (wanted,), (found,) = (torch.autograd.grad(call(x, weight).sum(), x) for call in (model, compiled(model)))
    assert torch.equal(found, wanted)


def narrowed(activation, dtype):
    """Activation in float32, and its product in 16 bits, as autocast has it."""
    return lambda x, weight: activation(x * 2).to(dtype) @ weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [nn.ReLU6(), nn.LeakyReLU(0.1)], ids=str)
def test_a_copy_that_is_rounded_is_not_read(activation, dtype):
    """Just below 6 it is 6 in 16 bits, and next to 0 it is 0 in float16."""
    numbers = torch.tensor([5.9999, 6.0, 1e-9, -1e-9, 3.0, -3.0, 0.0, 7.0]) / 2
    x, weight = numbers.expand(8, 8).clone().requires_grad_(), torch.randn(8, 8).to(dtype).requires_grad_()
    model = narrowed(activation, dtype)
    (wanted,), (found,) = (torch.autograd.grad(call(x, weight).sum(), x) for call in (model, compiled(model)))
    assert torch.equal(found, wanted)


class Compared(nn.Module):
    """A user's own comparison and clamp of one tensor."""

    def __init__(self, lower, upper, *, first=False, kept=True):
        super().__init__()
        self.lower, self.upper, self.first, self.kept = lower, upper, first, kept
        self.weight = nn.Parameter(torch.randn(4, 4).double())

    def forward(self, x):
        x = x * 2
        mask = x <= 0.0 if self.first else None
        clamped = x.clamp(self.lower, self.upper)
        kept = clamped @ self.weight if self.kept else clamped
        return kept + (x <= 0.0 if mask is None else mask)


@pytest.mark.parametrize(
    ("model", "applies"),
    [
        (Compared(0.0, 6.0), True),
        (Compared(0.0, 6.0, first=True), False),
        (Compared(0.0, 6.0, kept=False), False),
        (Compared(1.0, 6.0), False),
        (Compared(0.0, None), False),
    ],
    ids=["applies", "comparison before the clamp", "nothing keeps the output", "another bound", "one bound"],
)
def test_near_misses(model, applies):
    x = double(2, 4)
    module = joint_graph(model, x)
    joint_pass.run(module.graph)
    users = [node for node in comparisons_of(module.graph) if "clamp" in str(node.target)]
    assert bool(users) == applies
    torch.testing.assert_close(compiled(model)(x), model(x), rtol=0, atol=0)


def test_a_mask_that_is_cheaper_to_compute_again_is_not_saved():
    """Nothing keeps the last clamp's output; its input is made of what is saved."""
    for last in ([nn.SiLU(), nn.ReLU6()], [nn.GELU(), nn.Hardtanh()]):
        model, x = nn.Sequential(nn.Conv2d(3, 8, 3), *last).double(), double(2, 3, 8, 8)
        assert saved_for_backward(compiled(model), model, x) <= saved_for_backward(
            compiled(model, mode="eval"), model, x
        )


def test_bounds_that_cross_are_left_alone():
    """clamp(x, 2, 1) is 1 everywhere: the output tells nothing of the input."""

    def crossing(x):
        return x.clamp(2.0, 1.0) + (x <= 2.0) + (x >= 1.0)

    module = joint_graph(crossing, double(2, 4))
    joint_pass.run(module.graph)
    assert not any("clamp" in str(node.target) for node in comparisons_of(module.graph))

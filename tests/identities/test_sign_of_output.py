"""The statement of sign_of_output; its matches on joint graphs; near-misses; what it saves."""

import pytest
import torch
import torch.nn.functional as F
from identities.test_mask_of_clamp import SPECIAL, net
from support import assert_as_eager, compiled, joint_graph
from test_backend import double
from torch import nn

from convbn_compile import joint_pass
from convbn_compile.identities import sign_of_output as identity
from convbn_compile.measure import saved_for_backward

ACTIVATIONS = [nn.LeakyReLU(0.1), nn.LeakyReLU(2.5), nn.ELU(), nn.ELU(0.3), nn.SELU(), nn.CELU(), nn.CELU(3.0)]
# the activation, its c, its n, and what exp has an absolute error of: a rounding of z
ELUS = [(nn.ELU(), 1, 1), (nn.ELU(0.3), 1, 0.3), (nn.SELU(), 1, 1.7580993408473766), (nn.CELU(3.0), 1 / 3, 3)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_signs(activation, dtype):
    x = torch.cat([SPECIAL, torch.randn(1000) * 4]).to(dtype)
    z = activation(x)
    assert torch.equal(z > 0, x > 0)
    assert torch.equal(z <= 0, x <= 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("activation", "scale", "negative"), ELUS, ids=[str(activation) for activation, *_ in ELUS])
def test_statement(activation, scale, negative, dtype):
    x = -torch.cat([torch.tensor([0.0, 1e-30, 1e-3, 50.0, float("inf")]), torch.rand(1000) * 9]).to(dtype)
    (sign, wanted), (same, found) = identity.before(x, scale), identity.after(activation(x), negative)
    assert torch.equal(sign, same)
    assert (found - wanted).abs().max() <= 3 * torch.finfo(dtype).eps


def test_mutant_fails():
    """Without the division by n."""
    x = -torch.rand(1000, dtype=torch.float64)
    assert (F.elu(x, 0.3) + 1 - x.exp()).abs().max() > 0.1


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_backward_reads_the_output(activation):
    """Two outputs, which convolutions keep, and for the last, which none does, its input or bits of its signs."""
    model, x = net(activation), double(2, 4, 8, 8)
    elements = 2 * 4 * 8 * 8
    last = elements // 8 if isinstance(activation, nn.LeakyReLU) else elements * 8
    assert saved_for_backward(compiled(model), model, x) == 2 * elements * 8 + last
    assert_as_eager(model, x)


@pytest.mark.usefixtures("vectorised")
@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.1), nn.ELU(0.7)], ids=str)
def test_generated_code(activation):
    assert_as_eager(net(activation)[:5], double(2, 4, 8, 8), lowering="inductor")


def test_no_exponential_in_16_bits():
    """Of an output near -n nothing is left of exp(c x)."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ELU(), nn.Conv2d(4, 4, 1)).bfloat16()
    module = joint_graph(model, torch.randn(2, 4, 8, 8, dtype=torch.bfloat16))
    joint_pass.run(module.graph)
    assert module.graph.find_nodes(op="call_function", target=torch.ops.aten.exp.default)


class Activated(nn.Module):
    """An activation written out, whose output a product keeps or not."""

    def __init__(self, activation, *, kept=True):
        super().__init__()
        self.activation, self.kept = activation, kept
        self.weight = nn.Parameter(torch.randn(4, 4).double())

    def forward(self, x):
        z = self.activation(x.sin())
        return z @ self.weight if self.kept else z


def elu(scale):
    return lambda x: torch.ops.aten.elu(x, 0.7, scale, 1)


CASES = {
    "leaky ReLU": (Activated(lambda x: F.leaky_relu(x, 0.1)), True),
    "a negative slope": (Activated(lambda x: F.leaky_relu(x, -0.1)), False),
    "no slope": (Activated(lambda x: F.leaky_relu(x, 0.0)), False),
    "ELU": (Activated(elu(1.5)), True),
    "small numbers may vanish": (Activated(elu(0.5)), False),
    "nothing keeps the output": (Activated(lambda x: F.leaky_relu(x, 0.1), kept=False), False),
}


@pytest.mark.parametrize(("model", "applies"), CASES.values(), ids=CASES)
def test_near_misses(model, applies):
    x = double(2, 4)
    module = joint_graph(model, x)
    joint_pass.run(module.graph)
    signs = (torch.ops.aten.gt.Scalar, torch.ops.aten.le.Scalar)
    compared = [str(node.args[0].target) for node in module.graph.nodes if node.target in signs]
    assert ("aten.where.self" in compared) == applies
    assert_as_eager(model, x)


def test_an_exponential_that_is_read_for_more_stays():
    """The user's own exp(x) of the activation's input."""
    model, x = Activated(lambda x: F.elu(x) + x.exp()), double(2, 4)
    assert_as_eager(model, x)

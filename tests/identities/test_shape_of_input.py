"""The statement of shape_of_input, bit for bit; its matches on joint graphs; near-misses; what it saves."""

import pytest
import torch
from identities.grid import IDS, SETTINGS, case
from support import assert_as_eager, compiled, joint_graph, randomise
from test_backend import double, pair
from torch import nn

from convbn_compile import joint_pass
from convbn_compile.identities import shape_of_input as identity
from convbn_compile.measure import saved_for_backward

aten = torch.ops.aten


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_statement(setting):
    c = case(setting)
    wanted = identity.before(c.grad_output, c.input, c.weight, c.conv)
    assert torch.equal(identity.after(c.grad_output, c.input, c.weight, c.conv), wanted)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_memory_lies_as_the_input_does(memory_format):
    x = torch.randn(2, 8, 5, 5).to(memory_format=memory_format)
    assert identity.unwritten(x).stride() == x.stride()


def test_mutant_fails():
    """The weight's gradient does depend on the input."""
    c = case(SETTINGS[0])
    inputs = c.input, torch.zeros_like(c.input)
    of = [c.conv.backward(c.grad_output, x, c.weight, needs_input=False, needs_weight=True)[1] for x in inputs]
    assert not torch.equal(*of)


def net(frozen=(1, 2)):
    """Three conv, norm, ReLU, some of them frozen."""
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(3)]
    for index in frozen:
        blocks[index].requires_grad_(requires_grad=False)
    return randomise(nn.Sequential(*blocks).double())


def inputs_in_backward(model, x):
    """What each convolution_backward reads as its input after the pass."""
    module = joint_graph(model, x)
    joint_pass.run(module.graph)
    found = module.graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
    return [str(node.args[1].target).removesuffix(".default") for node in found]


def test_frozen_convolutions_read_no_input():
    assert sorted(inputs_in_backward(net(), double(2, 8, 6, 6))) == ["aten.empty_strided"] * 2 + ["primals_3"]


def test_a_trained_convolution_reads_its_input():
    assert inputs_in_backward(net(frozen=()), double(2, 8, 6, 6)).count("aten.empty_strided") == 0


def test_an_input_that_is_kept_anyway_is_read():
    """By a trained convolution beside the frozen one."""

    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.trained, self.frozen = (pair(nn.Conv2d(8, 8, 1)) for _ in range(3))
            self.frozen.requires_grad_(requires_grad=False)

        def forward(self, x):
            x = self.first(x).relu()
            return self.trained(x).relu() * self.frozen(x).relu()

    model, x = Forked(), double(2, 8, 6, 6)
    assert "aten.empty_strided" not in inputs_in_backward(model, x)
    assert_as_eager(model, x)


WAYS = [("aot_eager", torch.contiguous_format), ("aot_eager", torch.channels_last), ("inductor", torch.channels_last)]


@pytest.mark.usefixtures("vectorised")
@pytest.mark.parametrize(("lowering", "memory_format"), WAYS)
def test_as_eager(lowering, memory_format):
    x = double(2, 8, 6, 6).to(memory_format=memory_format).detach().requires_grad_()
    assert_as_eager(net(), x, lowering=lowering)


def test_dynamic_shapes():
    model, x = net(), double(2, 8, 6, 6)
    function = torch.compile(model, backend="convbn_tune", options={"lowering": "aot_eager"}, dynamic=True)
    for size in (6, 9):
        x = double(2, 8, size, size)
        wanted = torch.autograd.grad(model(x).sum(), model[0][0].weight)[0]
        torch.testing.assert_close(torch.autograd.grad(function(x).sum(), model[0][0].weight)[0], wanted)


def test_what_is_saved():
    """Of three activations, which Inductor keeps, not one: bits of their signs."""
    model, x = net(), double(2, 8, 8, 8)
    elements = 2 * 8 * 8 * 8
    frozen = saved_for_backward(compiled(model), model, x)
    assert frozen == 3 * elements // 8
    assert 2 * elements * 8 <= saved_for_backward(compiled(model, mode="eval"), model, x)


KINDS = {
    "grouped": (nn.Conv2d(8, 8, 3, groups=4), (2, 8, 6, 6)),
    "depthwise, dilated": (nn.Conv2d(8, 8, 3, groups=8, dilation=2), (2, 8, 6, 6)),
    "transposed": (nn.ConvTranspose2d(8, 8, 3, stride=2, groups=2, output_padding=1), (2, 8, 6, 6)),
    "1d, unbatched": (nn.Conv1d(8, 8, 3, padding=1), (8, 16)),
    "3d": (nn.Conv3d(8, 8, 3), (2, 8, 5, 5, 5)),
    "an empty batch": (nn.Conv2d(8, 8, 3), (0, 8, 6, 6)),
    "its bias trained": (nn.Conv2d(8, 8, 3), (2, 8, 6, 6)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_frozen_convolutions(kind):
    """The input of the frozen one, which a ReLU makes of what is trained, is not saved: bits of both signs are."""
    frozen, shape = KINDS[kind]
    trained = type(frozen)(8, 8, 1)
    model = randomise(nn.Sequential(trained, nn.ReLU(), frozen, nn.ReLU()).double())
    frozen.requires_grad_(requires_grad=False)
    if kind == "its bias trained":
        frozen.bias.requires_grad_()
    x = torch.randn(shape, dtype=torch.float64)
    signs = trained(x).numel() + model(x).numel()
    assert_as_eager(model, x, folded=0)
    assert saved_for_backward(compiled(model), model, x) <= signs // 8

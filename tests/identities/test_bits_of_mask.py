"""The statement of bits_of_mask; its matches on joint graphs; near-misses; what it saves, and when."""

import itertools

import pytest
import torch
from support import assert_as_eager, compiled, joint_graph, randomise
from test_backend import double
from torch import nn
from torch.utils.checkpoint import checkpoint

from convbn_compile import joint_pass
from convbn_compile.identities import bits_of_mask as identity
from convbn_compile.measure import saved_for_backward


@pytest.mark.parametrize(("shape", "axis"), [((8,), 0), ((2, 16), 1), ((3, 24, 5, 7), 1), ((2, 3, 4, 40), 3)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_statement(shape, axis, memory_format):
    mask = torch.rand(shape) < 0.5
    mask = mask.to(memory_format=memory_format) if len(shape) == 4 else mask
    bits = identity.pack(mask, axis)
    assert (bits.dtype, bits.numel()) == (torch.uint8, mask.numel() // 8)
    assert torch.equal(identity.unpack(bits, axis), mask)


def test_every_number_that_eight_booleans_make():
    masks = torch.tensor(list(itertools.product([False, True], repeat=8))).t().contiguous()
    assert torch.equal(identity.after(masks, 0), identity.before(masks))
    assert identity.pack(masks, 0).unique().numel() == 256


def test_mutant_fails():
    """Interleaved in place of eighth by eighth."""
    mask = torch.rand(2, 16) < 0.5
    interleaved = mask.reshape(2, 2, 8).transpose(1, 2).reshape(2, 16)
    assert not torch.equal(identity.unpack(identity.pack(interleaved, 1), 1), mask)


def pooled(activation, channels=8):
    """An activation that no convolution reads: pooling does."""
    layers = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), activation, nn.MaxPool2d(2)
    return randomise(nn.Sequential(*layers).double())


def packed(model, *inputs):
    """How many masks are saved as bits, and the graph."""
    module = joint_graph(model, *inputs)
    joint_pass.run(module.graph)
    return len(module.graph.find_nodes(op="call_function", target=torch.ops.prims.iota.default)), module


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(0.1), nn.Threshold(0.3, -1.0)], ids=str
)
def test_a_mask_is_saved_as_bits(activation):
    model, x = pooled(activation), double(2, 3, 8, 8, requires_grad=False)
    assert packed(model, x)[0] == 1
    elements = 2 * 8 * 8 * 8
    index = elements // 4  # of max pooling, a byte each
    assert saved_for_backward(compiled(model), model, x) == elements // 8 + index
    assert saved_for_backward(compiled(model, mode="eval"), model, x) > elements
    assert_as_eager(model, double(2, 3, 8, 8))


@pytest.mark.usefixtures("vectorised")
def test_generated_code():
    assert_as_eager(pooled(nn.ReLU()), double(2, 3, 8, 8), lowering="inductor")


def test_the_bits_are_made_where_the_activation_is():
    """Not at the end of forward, until when the activation would be in memory."""
    model = nn.Sequential(pooled(nn.ReLU()), nn.Conv2d(8, 8, 3).double(), nn.GELU(), nn.Conv2d(8, 8, 1).double())
    _, module = packed(model, double(2, 3, 8, 8))
    names = [str(node.target) for node in module.graph.nodes]
    assert names.index("aten.unbind.int") < names.index("aten.erf.default")


class Masked(nn.Module):
    """A function of a product, which backward does not keep itself."""

    def __init__(self, function, size=8):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(4, size).double())

    def forward(self, x):
        return self.function(x @ self.weight)


MASKS = {
    "one comparison": (lambda x: torch.where(x > 0.5, x, 3 * x), 8, 1),
    "two comparisons": (lambda x: torch.where((x > 0) & ~(x > 1), x, 3 * x), 8, 1),
    "no axis of a multiple of 8": (lambda x: torch.where(x > 0.5, x, 3 * x), 9, 0),
    "backward reads what is compared": (lambda x: torch.where(x > 0.5, x, 3 * x) + x.sin(), 8, 0),
    "what is saved is made of what is compared": (lambda x: torch.where(x > 0.5, x, 3 * x).sin(), 8, 1),
    "a product keeps what is compared": (lambda x: torch.where(x > 0.5, x, 3 * x) + x @ x.t() @ x, 8, 0),
    "compared with a tensor": (lambda x: torch.where(x > x.mean(), x, 3 * x), 8, 0),
}


@pytest.mark.parametrize(("function", "size", "count"), MASKS.values(), ids=MASKS)
def test_near_misses(function, size, count):
    model, x = Masked(function, size), double(3, 4)
    assert packed(model, x)[0] == count
    assert saved_for_backward(compiled(model), model, x) <= saved_for_backward(compiled(model, mode="eval"), model, x)
    assert_as_eager(model, x)


def test_the_batch_is_no_axis_of_bits():
    """What is saved would jump with its size, and largest_batch would not know where it is."""
    assert packed(Masked(lambda x: torch.where(x > 0.5, x, 3 * x), size=9), double(8, 4))[0] == 0


class Permuted(nn.Module):
    """A mask of what lies otherwise in memory than bits are unpacked to, and views of the gradient behind it."""

    def __init__(self, norm):
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 128), nn.BatchNorm1d(128) if norm else nn.Identity()

    def forward(self, x):
        return self.norm(self.linear(x)).view(-1, 8, 4, 4).permute(0, 2, 3, 1).relu().sum(3)


@pytest.mark.parametrize("norm", [False, True])
def test_gradients_that_lie_otherwise_in_memory_are_reshaped(norm):
    assert_as_eager(randomise(Permuted(norm)).double(), double(8, 6))


def test_what_is_given_is_compared_again():
    assert packed(lambda x: torch.where(x > 0, x, 2 * x), double(2, 8))[0] == 0


def test_a_users_checkpoint_computes_masks_again():
    body = pooled(nn.ReLU())

    def model(x):
        return checkpoint(body, x, use_reentrant=False)

    assert packed(model, double(2, 3, 8, 8))[0] == 0


def test_a_dynamic_batch():
    """The axis is one whose size is known."""
    model = pooled(nn.ReLU())
    function = torch.compile(model, backend="convbn_tune", options={"lowering": "aot_eager"}, dynamic=True)
    for batch in (8, 3):
        x = double(batch, 3, 8, 8)
        (wanted,), (found,) = (torch.autograd.grad(call(x).sum(), x) for call in (model, function))
        torch.testing.assert_close(found, wanted)

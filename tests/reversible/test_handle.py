"""Known networks as reversible ones: the pretrained network at alpha = 1, beta = 0, exact gradients, the way back."""

import copy
import pickle
import re

import pytest
import torch
from reversible.nets import NETS, UNITS, Residual, image, make, mlp
from torch import nn

from convbn_compile.reversible import handle_of, make_reversible


@pytest.mark.parametrize("name", NETS)
def test_known_networks(name):
    net = make(name)
    original, x = copy.deepcopy(net), image()
    keys, names = list(net.state_dict()), [name for name, _ in net.named_parameters()]
    handle = make_reversible(net)
    assert [len(chain.units) for chain in handle._chains] == UNITS[name]
    assert (list(net.state_dict()), [name for name, _ in net.named_parameters()]) == (keys, names)
    handle.set(1.0, 0.0)
    with torch.no_grad():
        assert (net(x) - original(x)).abs().max() == 0.0
    for alpha, beta, bound in ((1.0, 0.125, 1e-9), (0.3, 0.7, 1e-10), (0.0, 1.0, 1e-10)):
        handle.set(alpha, beta)
        assert handle.gradient_error(x) <= bound
        with torch.no_grad():
            assert (net(x) - original(x)).abs().max() > 1e-3
    handle.restore()
    assert torch.equal(net(x), original(x))
    assert [name for name, _ in net.named_modules()] == [name for name, _ in original.named_modules()]
    assert all("forward" not in module.__dict__ for module in net.modules())


def chained(functions, x, alpha, beta):
    """x_i = G_i(x_{i-1}) + beta x_{i-2}, written out."""
    history = [x, x]
    for g in functions:
        history.append(g(history[-1], alpha) + beta * history[-2])
    return (history[-1] + beta * history[-2]) / (1 + beta)


def basic(block):
    """relu(f(x) + alpha x) of torchvision's BasicBlock."""
    f = nn.Sequential(block.conv1, block.bn1, nn.ReLU(), block.conv2, block.bn2)
    return lambda x, alpha: (f(x) + alpha * x).relu()


def attention_and_mlp(block):
    """The two F of timm's ViT block, each with its residual connection."""
    attention = nn.Sequential(block.norm1, block.attn, block.ls1)
    mlp = nn.Sequential(block.norm2, block.mlp, block.ls2)
    return [lambda x, alpha: attention(x) + alpha * x, lambda x, alpha: mlp(x) + alpha * x]


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.125), (0.3, 0.7), (0.0, 1.0)])
def test_chains_of_real_blocks_are_what_the_equations_say(alpha, beta):
    stage, x = make("torchvision ResNet").layer3, torch.randn(2, 128, 6, 6, dtype=torch.float64)
    wanted = chained([basic(block) for block in stage[1:]], stage[0](x), alpha, beta)
    make_reversible(stage, alpha, beta)
    torch.testing.assert_close(stage(x), wanted, rtol=1e-12, atol=1e-12)
    blocks, tokens = make("timm ViT").blocks, torch.randn(2, 5, 16, dtype=torch.float64)
    wanted = chained([g for block in blocks for g in attention_and_mlp(block)], tokens, alpha, beta)
    make_reversible(blocks, alpha, beta)
    torch.testing.assert_close(blocks(tokens), wanted, rtol=1e-12, atol=1e-12)


def test_a_mutant_of_the_gradients_is_seen(monkeypatch):
    """gradient_error tells of an inverse that is off by 1e-6."""
    handle = make_reversible(make("torchvision ResNet"))
    right = handle.gradient_error(image())
    module = __import__("convbn_compile.reversible.coupling", fromlist=["coupling"])
    monkeypatch.setattr(module, "input_of", lambda after, beta: after / beta * (1 + 1e-6))
    assert right < 1e-9 < 1e-8 < handle.gradient_error(image())


def test_a_copy_and_a_pickle_of_the_weights():
    net = make("torchvision ResNet")
    handle, x = make_reversible(net), image()
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)
        assert not torch.equal(net(x), twin(x))
    twin.load_state_dict(pickle.loads(pickle.dumps(net.state_dict())))
    assert torch.equal(net(x), twin(x))
    handle.restore()
    assert not torch.equal(net(x), twin(x))


class Loop(nn.Module):
    """Goes through its blocks by itself."""

    def __init__(self, blocks, *, collects=False):
        super().__init__()
        self.first, self.blocks, self.collects = nn.Linear(6, 6), nn.ModuleList(blocks), collects

    def forward(self, x):
        x, seen = self.first(x), []
        for block in self.blocks:
            x = block(x)
            seen.append(x.clone() if self.collects else x)
            x = seen[-1]
        return x


def rows():
    return torch.randn(3, 6, dtype=torch.float64)


@pytest.mark.parametrize("chain", ["blocks", ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]])
def test_blocks_that_are_named(chain):
    torch.manual_seed(0)
    net = Loop([Residual(mlp()) for _ in range(4)]).double()
    x = rows()
    wanted = net(x)
    handle = make_reversible(net, chains=[chain])
    assert handle.gradient_error(x) <= 1e-9
    handle.set(1.0, 0.0)
    with torch.no_grad():
        assert torch.equal(net(x), wanted)
    handle.restore()
    assert torch.equal(net(x), wanted)


def test_a_chain_is_not_what_someone_else_goes_through():
    collects = Loop([Residual(mlp()) for _ in range(3)], collects=True).double()
    make_reversible(collects, chains=["blocks"])
    with pytest.raises(RuntimeError, match="from blocks.0 to blocks.2 are a reversible chain and run as one.*clone of"):
        collects(rows())
    early = Loop([Residual(mlp()) for _ in range(3)]).double()
    make_reversible(early, chains=["blocks"])
    with pytest.raises(RuntimeError, match="are a reversible chain and run as one"):
        _ = early.blocks[1](early.blocks[0](rows())).shape
    with pytest.raises(RuntimeError, match="are a reversible chain and run as one"):
        early.blocks[1](rows())
    with pytest.raises(RuntimeError, match="are a reversible chain and run as one"):
        early.blocks[2](early.blocks[0](rows()))
    net = make("timm ViT")
    make_reversible(net)
    with pytest.raises((RuntimeError, TypeError), match="are a reversible chain and run as one|HandedOn"):
        net.forward_intermediates(image())


class WithRate(Residual):
    def forward(self, x, rate=None):
        return x + self.f(x) * (rate or 1.0)


@pytest.mark.parametrize(("rate", "right"), [(None, True), (0.5, False)])
def test_arguments_beside_x_are_at_their_defaults(rate, right):
    class Rated(Loop):
        def forward(self, x):
            for block in self.blocks:
                x = block(x, rate=rate)
            return x

    net = Rated([WithRate(mlp()) for _ in range(3)]).double()
    handle, x = make_reversible(net, chains=["blocks"]), rows()
    if right:
        assert handle.gradient_error(x) <= 1e-9
    else:
        with pytest.raises(RuntimeError, match="are a reversible chain and run as one"):
            net(x)


def test_two_chains_of_one_parent():
    net = nn.Sequential(*(Residual(mlp()) for _ in range(6))).double()
    x = rows()
    wanted = net(x)
    handle = make_reversible(net, chains=[["0", "1"], ["3", "4", "5"]])
    assert handle.gradient_error(x) <= 1e-9
    with pytest.raises(RuntimeError, match="from 0 to 1 are a reversible chain"):
        net[1](x)
    handle.restore()
    assert torch.equal(net(x), wanted)


class Narrowing(nn.Linear):
    def __init__(self):
        super().__init__(6, 5)


class InPlace(nn.Module):
    def forward(self, x):
        return x.relu_()


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x + self.linear(x)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Narrowing, "1 makes (3, 5) of (3, 6), but a block of a chain keeps the shape"),
        (InPlace, "1 modifies its input in place, which backward could not rebuild"),
        (Counting, "1 writes to its buffer calls in forward"),
    ],
)
def test_blocks_that_cannot_be_rebuilt(block, message):
    net = nn.Sequential(Residual(mlp()), block()).double()
    make_reversible(net, chains=[""])
    with pytest.raises(ValueError, match=re.escape(message)):
        net(rows())


def test_backward_at_beta_0():
    net = make("torchvision ResNet")
    make_reversible(net, beta=0.0)
    with pytest.raises(ValueError, match="from layer2.1 to layer2.2 has beta = 0"):
        net(image())


@pytest.mark.parametrize(
    ("f", "every"),
    [
        (nn.Sequential(nn.Linear(6, 6), nn.GELU()), 4),
        (nn.Sequential(nn.Linear(6, 6), nn.ReLU6()), 1),
        (nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Hardswish()), 1),
        (nn.Linear(6, 6), 1),  # its activation may be a function
    ],
    ids=str,
)
def test_unknown_blocks_are_rectified_unless_they_are_known_to_be_smooth(f, every):
    handle = make_reversible(nn.Sequential(*(Residual(copy.deepcopy(f)) for _ in range(8))), chains=[""])
    assert handle.lengths(handle._chains[0], torch.float32, low_precision=False) == [every] * (8 // every)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"alpha": "1"}, TypeError, "alpha must be a number, got '1' (str)"),
        ({"beta": -0.1}, ValueError, "beta must be a finite number of at least 0, got -0.1"),
        ({"anchor_every": 0}, ValueError, "anchor_every must be at least 1, got 0"),
        ({"anchor_every": "often"}, TypeError, "anchor_every must be a number of blocks"),
        ({"chains": ["nowhere"]}, ValueError, "the model has no module 'nowhere'"),
        ({"chains": [3]}, TypeError, "chains is a list of paths of modules whose children are blocks"),
        ({"chains": [["0", "2"]]}, ValueError, "the blocks of a list in chains follow each other"),
        ({"chains": [["0", "1.f"]]}, ValueError, "a list of blocks in chains has children of one module"),
        ({"chains": [["0", "1"], ["1", "2"]]}, ValueError, "chains has 1 twice"),
        ({"chains": "blocks"}, TypeError, "chains is a list, such as [\"layer3\"], got 'blocks'"),
        ({"chains": []}, ValueError, "chains is empty"),
        ({"chains": ["", ["1.f.0", "1.f.1"]]}, ValueError, "1.f.0 is inside of 1, which chains has, too"),
        ({}, ValueError, "found no two residual blocks of one shape in a row in Sequential"),
    ],
)
def test_errors(arguments, error, message):
    net = nn.Sequential(*(Residual(mlp()) for _ in range(3)))
    with pytest.raises(error, match=re.escape(message)):
        make_reversible(net, **arguments)
    assert all("forward" not in module.__dict__ for module in net.modules())


def test_more_errors():
    with pytest.raises(TypeError, match="make_reversible needs a torch.nn.Module, got 3"):
        make_reversible(3)
    net = make("torchvision ResNet")
    net.layer2[2].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="layer2.2 has hooks, which a chain would not call"):
        make_reversible(net)
    assert "forward" not in net.layer2.__dict__
    net = make("torchvision ResNet")
    make_reversible(net)
    with pytest.raises(ValueError, match="is reversible already"):
        make_reversible(net)


def test_the_table():
    printed = str(make_reversible(make("torchvision ResNet")))
    assert printed.startswith("alpha = 1, beta = 0.125")
    assert re.search(r"layer3.1 to layer3.3 +3 +1 +6e-08", printed)


def test_a_block_that_is_there_twice():
    first, second = Residual(mlp()), Residual(mlp())
    with pytest.raises(ValueError, match="chains has 2 twice"):
        make_reversible(nn.Sequential(first, second, first), chains=[""])


def test_a_copy_has_a_handle_of_its_own():
    net = make("torchvision ResNet")
    handle = make_reversible(net)
    average = torch.optim.swa_utils.AveragedModel(net)
    handle.set(0.3, 0.7)
    copied = handle_of(average.module)
    assert (copied.alpha, copied.beta) == (1.0, 0.125)
    copied.set(handle.alpha, handle.beta)
    x = image()
    assert torch.equal(average(x), net(x))
    with pytest.raises(ValueError, match="handle_of: the model is not reversible"):
        handle_of(make("torchvision ResNet"))


def test_a_reversible_model_is_pickled():
    net = make("timm ViT")
    make_reversible(net, 0.3, 0.7)
    x = image()
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))


def test_gradient_error_leaves_no_trace():
    net = make("torchvision ResNet").train()
    handle, x = make_reversible(net), image()
    loss = net(x).sum()
    state, generator = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    handle.gradient_error(x)
    assert all(torch.equal(before, net.state_dict()[name]) for name, before in state.items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in net.parameters())
    loss.backward()  # the graph from before is good
    with pytest.raises(RuntimeError):
        handle.gradient_error(x[:, :2])
    assert all(torch.equal(before, net.state_dict()[name]) for name, before in state.items())
    net.requires_grad_(requires_grad=False)
    with pytest.raises(ValueError, match="needs a parameter that requires grad"):
        handle.gradient_error(x)
    handle.restore()
    with pytest.raises(ValueError, match="gave the original model back"):
        handle.gradient_error(x)


def test_the_table_at_beta_0():
    assert "layer3.1 to layer3.3" in str(make_reversible(make("torchvision ResNet"), beta=0.0))


def test_hooks_that_come_later():
    net = make("torchvision ResNet")
    make_reversible(net)
    net.layer3[2].register_forward_hook(lambda *call: None)
    with pytest.raises(RuntimeError, match="has no hooks"):
        net(image())


def test_pickled_after_compiling():
    net, x = make("torchvision ResNet"), image()
    make_reversible(net).compile(options={"lowering": "aot_eager"})
    assert torch.equal(pickle.loads(pickle.dumps(net)).eval()(x), copy.deepcopy(net)(x))

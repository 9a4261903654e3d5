"""How a side-tuned network runs: with checkpoints, masks and other sizes; what it does not take."""

import re
import warnings

import pytest
import timm
import torch
from reversible.nets import Residual, image, mlp
from side_tuning.test_attach import trained
from support import relative_errors, run
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from convbn_compile._runs import HandedOn
from convbn_compile.side_tuning import attach, handle_of


def test_other_checkpoints_compute_the_same():
    net, handle = trained("timm ViT")
    net.train()
    x = image()
    for module in net.modules():
        if isinstance(module, timm.layers.DropPath):
            module.eval()
    wanted = run(net, net, x)
    net.blocks.forward = lambda x: checkpoint_sequential(list(net.blocks), 3, x, use_reentrant=False)
    assert not any(relative_errors(run(net, net, x), wanted).values())


def test_features_from_between_blocks():
    net, _ = trained("timm ViT")
    with pytest.raises(RuntimeError, match=r"blocks\.2 is side-tuned: it gets what"):
        net.forward_intermediates(image(), indices=2)
    net, _ = trained()
    seen = []
    net.layer3.register_forward_hook(lambda *call: seen.append(call[2]))
    net(image())
    assert isinstance(seen[0], torch.Tensor)  # what a stage returns
    with pytest.raises(RuntimeError, match=r"layer3\.2 is side-tuned: it gets what the block before it handed on"):
        net.layer3[2](torch.randn(1, 64, 4, 4, dtype=torch.float64))


def test_models_of_one_width_only():
    class Uneven(nn.Module):
        def __init__(self, f):
            super().__init__()
            self.first, self.f = nn.Linear(6, 6), f

        def forward(self, x):
            return self.f(x)

    def make_with(f):
        net = nn.Sequential(*(Residual(mlp()) for _ in range(2)), Uneven(f), nn.Linear(6, 2))
        attach(net, blocks=[["0", "1", "2"]], start=0, head="3")
        return net

    with pytest.raises(ValueError, match=re.escape("2 makes (3, 5) of (3, 6)")):
        make_with(nn.Linear(6, 5))(torch.randn(3, 6))
    with pytest.raises(ValueError, match="2 modifies its input in place, which its tap needs"):
        make_with(nn.ReLU(inplace=True))(torch.randn(3, 6))
    net = nn.Sequential(Residual(nn.Sequential(nn.Conv2d(4, 4, 1))), nn.Conv2d(4, 2, 1))
    attach(net, blocks=[["0"]], head="1")
    with pytest.raises(ValueError, match=r"taken to get 4 channels in dimension 1, .* but got \(2, 3, 4, 4\)"):
        net(torch.randn(2, 3, 4, 4))


def test_tokens_that_are_no_grid():
    net = nn.Sequential(*(Residual(mlp()) for _ in range(2)), nn.Linear(6, 2))
    attach(net, blocks=[["0", "1"]], plus=True)
    with pytest.raises(ValueError, match=re.escape("of tokens (2, 7, 6) it is known for ViTs")):
        net(torch.randn(2, 7, 6))
    net, _ = trained("timm ViT", plus=True)
    with pytest.raises(ValueError, match="4 x 4 besides 1 other tokens, and got 10 tokens. Use plus=False"):
        handle_of(net).side_network.convs["0"](torch.randn(1, 10, 16, dtype=torch.float64))
    net.set_input_size((16, 64))
    net(torch.randn(1, 3, 16, 64, dtype=torch.float64))  # the grid is the model's, of the time


def test_what_is_handed_on_has_no_protocols():
    """As copies and Dynamo ask for them, of an object that is not made yet, too."""
    assert not hasattr(HandedOn(1, 0, "m"), "__array__")
    assert not hasattr(HandedOn.__new__(HandedOn), "message")
    for asked in (lambda handed: handed.shape, lambda handed: handed[0]):
        with pytest.raises(RuntimeError, match="m Here .* of what is between its blocks was asked for"):
            asked(HandedOn(1, 0, "m"))


def test_reentrant_checkpoints_leave_the_taps_out():
    net, _ = trained("timm ViT", start=0)
    net.train()
    net.patch_embed.register_forward_hook(lambda *call: call[2].requires_grad_())
    net.blocks.forward = lambda x: checkpoint_sequential(list(net.blocks), 3, x.detach(), use_reentrant=True)
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(RuntimeError, match="the blocks before ran without a graph, as in a reentrant checkpoint"),
    ):
        net(image()).sum().backward()


def test_all_blocks_in_a_reentrant_checkpoint():
    """No gradient would reach the side network, without a word."""
    net, handle = trained("timm ViT", start=0)
    blocks = list(net.blocks)
    net.blocks.forward = lambda x: checkpoint(nn.Sequential(*blocks), x, use_reentrant=True)
    with warnings.catch_warnings(action="ignore"):
        net(image())  # in eval mode
        net.train()
        with torch.no_grad():
            net(image())
        with pytest.raises(RuntimeError, match=r"blocks\.2 is side-tuned and ran without a graph, as in a reentrant"):
            net(image())
    del net.blocks.forward
    net(image()).sum().backward()
    handle.detach()
    assert not net._forward_hooks and not net._forward_pre_hooks


class Masked(nn.Module):
    """A block of two arguments."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(6, 6)

    def forward(self, x, mask=None):
        return x + self.f(x) * mask


class Called(nn.Module):
    """Calls its blocks by keyword."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Masked() for _ in range(2))
        self.head = nn.Linear(6, 2)

    def forward(self, x, mask):
        for block in self.blocks:
            x = block(mask=mask, x=x)
        return self.head(x)


def test_blocks_of_more_arguments():
    torch.manual_seed(0)
    net, x, mask = Called(), torch.randn(3, 6), torch.randn(3, 6)
    wanted = net(x, mask)
    attach(net, blocks=["blocks"], start=0)
    assert torch.equal(net(x, mask), wanted)
    with pytest.raises(ValueError, match=r"a tensor among the other arguments of blocks\.0 requires grad"):
        net(x, mask.requires_grad_())

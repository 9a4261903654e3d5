"""Side-tuned networks in low precision, in mixed precision and under autocast, against float64."""

import copy

import pytest
import timm
import torch
from reversible.nets import image, make
from side_tuning.test_attach import RESNET, trained
from support import relative_errors, run
from torch import nn
from torch.nn import functional as F

from convbn_compile.side_tuning import attach, handle_of
from convbn_compile.side_tuning._tap import Factors, Tap


class ByHand(nn.Module):
    """What a side-tuned network computes, with h in one sum."""

    def __init__(self, net):
        super().__init__()
        self.net, handle = net, handle_of(net)
        self.blocks, self.side = handle.all_blocks, handle.side_network
        for block in self.blocks:
            block.module.forward = lambda z, block=block: self.adapted(block, z)

    def adapted(self, block, z):
        part = self.side.at(block.index)
        if block.index == 0 or block.stage != self.blocks[block.index - 1].stage:
            self.h = 0
        found = type(block.module).forward(block.module, z)
        if part is None:
            return found
        self.h = self.h + part.tap.c(part.tap.a(z))
        if not part.adapts:
            return found
        change = F.silu(part.beta * self.h) / part.beta
        return found + (change if part.conv is None else part.conv(change))

    def forward(self, x):
        return self.net(x)


def trained_by_hand(net):
    """The same on a copy."""
    twin = copy.deepcopy(net)
    return ByHand(twin), twin


@pytest.mark.parametrize("name", ["timm Swin", "timm ConvNeXt", RESNET])
@pytest.mark.parametrize("plus", [False, True])
def test_of_stages(name, plus):
    """In float64: each stage starts at h = 0."""
    net, _ = trained(name, start=1, plus=plus, kernel_size=3)
    twin, inside = trained_by_hand(net)
    x = image()
    assert max(relative_errors(run(net, net, x), run(twin, inside, x)).values()) <= 1e-10


def low(net, function, x, cotangent, **autocast):
    """Outputs and gradients, in float64."""
    with torch.autocast("cpu", torch.bfloat16, **autocast):
        found = function(x)
    parameters = {name: one for name, one in net.named_parameters() if one.requires_grad}
    gradients = torch.autograd.grad(found, list(parameters.values()), cotangent.to(found.dtype))
    return {"output": found.detach().double()} | {
        name: each.double() for name, each in zip(parameters, gradients, strict=True)
    }


def distances(found, wanted):
    """Of each tensor, relative."""
    return {name: ((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted}


@pytest.mark.parametrize(
    ("name", "plus"), [("timm ViT", True), ("torchvision ConvNeXt", False), ("torchvision Swin", False), (RESNET, True)]
)
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision(name, plus, autocast):
    """No further from float64 than twice what the sum by hand is, in the mean of all that is trained."""
    net, _ = trained(name, start=1, plus=plus, kernel_size=3, swish_beta=3.0)
    net = net.bfloat16()
    exact = copy.deepcopy(net).double()
    net = net.float() if autocast else net
    by_hand, inside = trained_by_hand(net)
    x = image().bfloat16()
    cotangent = torch.randn(2, 5)
    wanted = low(exact, exact, x.double(), cotangent, enabled=False)
    given = x.float() if autocast else x
    found = distances(low(net, net, given, cotangent, enabled=autocast), wanted)
    eager = distances(low(inside, by_hand, given, cotangent, enabled=autocast), wanted)
    assert found["output"] <= 2 * eager["output"]
    assert sum(found.values()) <= 2 * sum(eager.values())


@pytest.mark.parametrize("plus", [False, True])
def test_norms_in_float32(plus):
    """Of a backbone in bfloat16: taps are as what computes, and so is what they read."""
    net = timm.models.vision_transformer.VisionTransformer(32, 8, embed_dim=16, depth=3, num_heads=4, num_classes=5)
    net.bfloat16()
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    handle = attach(net, plus=plus, kernel_size=3)
    assert {parameter.dtype for parameter in handle.side_network.parameters()} == {torch.bfloat16}
    net(image().bfloat16()).sum().backward()
    assert handle.side_network.taps["1"].c.weight.grad.abs().sum() > 0


def test_a_tap_reads_what_it_can():
    """In its own dtype, and hands on what the next one has."""
    first, second = Tap(6, 2, -1).bfloat16(), Tap(6, 2, -1)
    z = torch.randn(3, 6)
    factors = second(z.bfloat16(), first(z, None))
    assert factors.u.dtype == factors.c.dtype == torch.float32
    assert factors.u.shape == (3, 4) and factors.c.shape == (6, 4)
    back = first(z, second(z, None))
    assert back.u.dtype == back.c.dtype == torch.bfloat16
    product = second.product(Factors(factors.u, torch.ones_like(factors.c)))
    torch.testing.assert_close(product, factors.u.sum(1, keepdim=True).expand(3, 6))
    assert second.to("meta")(z.to("meta", torch.bfloat16), None).u.dtype == torch.float32  # which has no autocast
    second = Tap(6, 2, -1)
    with torch.autocast("cpu", torch.bfloat16):
        assert second(z, None).u.dtype == torch.bfloat16


def test_a_sum_of_taps_in_two_dtypes():
    """Blocks in bfloat16, then in float32: as in float32 with the first ones' values."""
    net = make("timm ViT").float()
    handle = attach(net, start=0)
    with torch.no_grad():
        for parameter in handle.side_network.parameters():
            parameter.normal_(std=0.1).copy_(parameter.bfloat16())
    x = image().float()
    wanted = net(x)
    handle.side_network.taps["0"].bfloat16()
    torch.testing.assert_close(net(x), wanted, rtol=0.02, atol=0.02)

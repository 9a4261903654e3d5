"""The side network against the paper's recursion, written down once more: outputs and every gradient, in float64."""

import copy

import pytest
import torch
from reversible.nets import NETS, Residual, image, make, mlp
from support import randomise, run
from timm.models import beit, eva, swin_transformer_v2, vision_transformer
from torch import nn
from torch.nn import functional as F
from torchvision.models import swin_transformer

from convbn_compile.measure import saved_for_backward
from convbn_compile.side_tuning import _blocks, attach
from convbn_compile.side_tuning._tap import Factors


def recursion(blocks, z, taps, start, g, beta):
    """h starts at 0; blocks, taps and convolutions are functions."""
    h = torch.zeros_like(z)
    for index, (block, (a, c)) in enumerate(zip(blocks, taps, strict=True)):
        h = h + (z @ a.T) @ c.T
        z = block(z)
        if index >= start:
            z = z + g(h * torch.sigmoid(beta * h))
    return z


def tokens_conv(weight):
    """Of the patches of a class token and a grid of 2 x 3."""

    def g(u):
        patches = u[:, 1:].transpose(1, 2).reshape(u.shape[0], u.shape[2], 2, 3)
        found = F.conv2d(patches, weight, padding=weight.shape[-1] // 2, groups=u.shape[2])
        return torch.cat([u[:, :1], found.flatten(2).transpose(1, 2)], 1)

    return g


class Tokens(nn.Module):
    """Four pre-norm blocks between a stem and a head, with what tells a grid of patches."""

    num_prefix_tokens = 1

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Linear(5, 6)
        self.patch_embed.grid_size = (2, 3)
        self.blocks = nn.Sequential(*(Residual(mlp()) for _ in range(4)))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.blocks(self.patch_embed(x)).mean(1))


@pytest.mark.parametrize("start", range(4))
@pytest.mark.parametrize("plus", [False, True])
def test_recursion(start, plus):
    torch.manual_seed(0)
    net = Tokens().double()
    frozen = copy.deepcopy(net).requires_grad_(requires_grad=False)
    handle = attach(net, rank=2, start=start, plus=plus, kernel_size=3, blocks=["blocks"], swish_beta=3.0)
    for parameter in handle.side_network.parameters():
        nn.init.normal_(parameter)
    twins = {name: one.detach().clone().requires_grad_() for name, one in handle.side_network.named_parameters()}
    taps = [(twins[f"taps.{i}.a.weight"], twins[f"taps.{i}.c.weight"]) for i in range(4)]
    g = tokens_conv(twins["convs.0.weight"]) if plus else lambda u: u
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    wanted = frozen.head(recursion(frozen.blocks, frozen.patch_embed(x), taps, start, g, 3.0).mean(1))
    found = net(x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(found)
    gradients = torch.autograd.grad(found, list(handle.side_network.parameters()), cotangent)
    for gradient, want in zip(gradients, torch.autograd.grad(wanted, list(twins.values()), cotangent), strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_at_first_it_is_the_frozen_network(name, plus):
    net, x = make(name), image()
    with torch.no_grad():
        wanted = net(x)
    handle = attach(net, start=1, plus=plus, kernel_size=3)
    with torch.no_grad():
        assert torch.equal(net(x), wanted)
    found = run(net.train(), net, x.detach())
    for tap in handle.side_network.taps.values():
        assert tap.c.weight.grad.abs().sum() > 0
        assert not tap.a.weight.grad.any()
    for conv in handle.side_network.convs.values():
        assert not conv.weight.grad.any()
    trained = {name for name, _ in net.named_parameters() if found[name] is not None}
    assert trained == {name for name, one in net.named_parameters() if any(one is each for each in handle.parameters())}


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 4, "num_classes": 5}
KEEPING_SHAPE = {
    "beit.Block": (lambda: beit.Beit(**VIT), [16, 16]),
    "eva.EvaBlock": (lambda: eva.Eva(**VIT, use_rot_pos_emb=True), [16, 16]),
    "swin_transformer_v2.SwinTransformerV2Block": (
        lambda: swin_transformer_v2.SwinTransformerV2(
            32, 4, embed_dim=8, depths=(1, 2), num_heads=(2, 4), window_size=4, num_classes=5
        ),
        [16, 16],
    ),
    "vision_transformer.ParallelScalingBlock": (
        lambda: vision_transformer.VisionTransformer(**VIT, block_fn=vision_transformer.ParallelScalingBlock),
        [16, 16],
    ),
    "vision_transformer.ResPostBlock": (
        lambda: vision_transformer.VisionTransformer(**VIT, block_fn=vision_transformer.ResPostBlock),
        [16, 16],
    ),
    "swin_transformer.SwinTransformerBlockV2": (
        lambda: swin_transformer.SwinTransformer(
            [4, 4],
            8,
            [1, 2],
            [2, 4],
            [4, 4],
            num_classes=5,
            block=swin_transformer.SwinTransformerBlockV2,
            downsample_layer=swin_transformer.PatchMergingV2,
        ),
        [16, 16],
    ),
}


def test_all_other_known_classes_are_tested():
    assert {f"{module.rpartition('.')[2]}.{name}" for module, name in _blocks.KEEPING_SHAPE} == set(KEEPING_SHAPE)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("name", KEEPING_SHAPE)
def test_other_known_classes(name, plus):
    make_one, widths = KEEPING_SHAPE[name]
    net, x = randomise(make_one()).double().eval(), image()
    wanted = net(x)
    handle = attach(net, start=1, plus=plus, kernel_size=3)
    assert torch.equal(net(x), wanted)
    assert [tap.width for tap in handle.side_network.taps.values()] == widths
    net(x).sum().backward()
    assert all(tap.c.weight.grad.abs().sum() > 0 for tap in handle.side_network.taps.values())


@pytest.mark.parametrize("name", ["timm ViT", "timm Swin", "timm ConvNeXt", "timm RegNet", "torchvision bottlenecks"])
def test_a_step_changes_the_output(name):
    """The mutant of the test above: what is fed back is no constant 0."""
    net, x = make(name), image()
    before = net(x)
    handle = attach(net, start=1, plus=True, kernel_size=3)
    with torch.no_grad():
        for tap in handle.side_network.taps.values():
            tap.c.weight.normal_()
    assert not torch.allclose(net(x), before, rtol=1e-3)


def test_channels_first_and_last_agree():
    """Convolutions of one pixel are linear maps."""
    torch.manual_seed(0)
    last = nn.Sequential(*(Residual(nn.Linear(6, 6)) for _ in range(4))).double()
    first = nn.Sequential(*(Residual(nn.Conv2d(6, 6, 1)) for _ in range(4))).double()
    for one, other in zip(last, first, strict=True):
        other.f.weight.data = one.f.weight.data[:, :, None, None].clone()
        other.f.bias.data = one.f.bias.data.clone()
    handles = [attach(net, blocks=[""], plus=True, kernel_size=3, head=[]) for net in (last, first)]
    with torch.no_grad():
        for one, other in zip(*(handle.side_network.parameters() for handle in handles), strict=True):
            one.normal_()
            other.copy_(one.view_as(other))
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), first(x), rtol=1e-12, atol=1e-12)


def test_a_sum_of_many_is_rounded_once():
    """In low precision h is one product, accumulated in float32, and its swish no overflow of beta h."""
    torch.manual_seed(0)
    net = nn.Sequential(*(Residual(mlp()) for _ in range(4)))
    part = attach(net, blocks=[""], head=[]).side_network.at(3)
    u, c = torch.randn(64, 256).bfloat16(), torch.randn(6, 256).bfloat16()
    exact = u.double() @ c.double().T
    error = (part.tap.product(Factors(u, c)).double() - exact).abs().max()
    assert error <= 2**-8 * exact.abs().max()
    assert part._change(torch.full((1, 2), 60.0).half(), torch.full((6, 2), 60.0).half()).isfinite().all()


def test_what_is_as_large_as_the_features_is_computed_again():
    """Of a block that is adapted the rank-d' factors are saved, neither h nor its swish."""
    net = nn.Sequential(*(Residual(nn.Linear(64, 64)) for _ in range(6)))
    attach(net, blocks=[""], head=[], start=0, rank=2, plus=False)
    x = torch.randn(32, 64)
    features = 5 * x.numel() * 4  # what taps read, the first x not counted
    factors = sum(2 * count for count in range(1, 7)) * (32 + 64) * 4
    assert saved_for_backward(net, net, x) <= features + 2 * factors

"""Whole networks in float64: output and every gradient as eager's."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from support import assert_as_eager, compiled, randomise, relative_errors, run
from timm.models import regnet
from torch import nn
from torchvision.models.video import resnet as video


class Hardsigmoid(nn.Module):
    def forward(self, x):
        return F.relu6(x + 3) / 6


class Hardswish(nn.Module):
    def forward(self, x):
        return x * F.relu6(x + 3) / 6


def mobilenet_v3_small(*, written_out=True):
    """With its activations written out: eager's kernels for their gradients take a float32 1/6 in float64 too."""
    model = torchvision.models.mobilenet_v3_small(weights=None)
    for parent in list(model.modules()) if written_out else ():
        for name, module in parent.named_children():
            if isinstance(module, (nn.Hardswish, nn.Hardsigmoid)):
                setattr(parent, name, Hardswish() if isinstance(module, nn.Hardswish) else Hardsigmoid())
    return model


REGNET = regnet.RegNetCfg(depth=5, w0=8, wa=27, wm=2.0, group_size=8)


def small_r3d():
    return video.VideoResNet(video.BasicBlock, [video.Conv3DSimple] * 4, [1, 1, 1, 1], video.BasicStem)


MODELS = {
    "resnet18": (lambda: torchvision.models.resnet18(weights=None), (2, 3, 64, 64), 20),
    "mobilenet_v3_small": (mobilenet_v3_small, (2, 3, 64, 64), 34),
    "regnetx": (lambda: regnet.RegNet(REGNET), (2, 3, 64, 64), 20),
    "r3d": (small_r3d, (1, 3, 4, 32, 32), 12),
}


@pytest.mark.parametrize("name", MODELS)
def test_output_and_every_gradient(name):
    make, shape, folded = MODELS[name]
    check(make(), shape, folded)


@pytest.mark.usefixtures("vectorised")
def test_output_and_every_gradient_of_inductor():
    """Of the stem of ResNet-18, a block as it is and one with a shortcut."""
    net = torchvision.models.resnet18(weights=None)
    stem = net.conv1, net.bn1, net.relu, net.maxpool
    check(nn.Sequential(*stem, net.layer1[0], net.layer2[0]), (2, 3, 32, 32), 6, lowering="inductor")


def check(model, shape, folded, **options):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    model = randomise(model.double())
    assert_as_eager(model, x, folded=folded, fold="always", output=1e-10, gradients=1e-8, **options)


def test_mobilenet_v3_as_it_is_against_the_same_lowering_without_folds():
    """As far as it has blocks of each kind."""
    model = randomise(mobilenet_v3_small(written_out=False).double()).features[:6]
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    errors = relative_errors(run(compiled(model), model, x), run(compiled(model, mode="eval"), model, x))
    assert max(errors.values()) <= 1e-10


def test_eager_takes_a_float32_sixth():
    """The reason for writing the activations out: fails when torch mends it, and then they need not be any more."""
    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    F.hardsigmoid(x).backward()
    assert 1e-9 < abs(x.grad.item() * 6 - 1) < 1e-7

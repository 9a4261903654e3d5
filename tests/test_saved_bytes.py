"""Bytes saved for backward: those of the fused network, never above plain Inductor's, the folded weight never."""

import pytest
import timm
import torch
import torchvision
from saved_bytes import measure
from support import compiled, counted, options, randomise
from tabulate import tabulate
from test_backend import pair
from torch import nn
from torchvision.models import densenet, mnasnet, mobilenetv2, mobilenetv3, regnet, resnet, shufflenetv2

import convbn_compile
from convbn_compile.measure import saved_for_backward

MIB = 2**20

# Goals in MiB: torchvision model, input, what is saved at most.
GOALS = [
    ("resnet18", (4, 3, 128, 128), 9.7),
    ("resnet50", (4, 3, 224, 224), 140.5),
    ("efficientnet_b0", (4, 3, 128, 128), 64.5),
]


def model(name):
    return randomise(getattr(torchvision.models, name)(weights=None))


def blocks(channels, **settings):
    """Two conv, norm, ReLU."""
    layers = [[nn.Conv2d(channels, channels, 3, **settings), nn.BatchNorm2d(channels), nn.ReLU()] for _ in range(2)]
    return nn.Sequential(*(layer for block in layers for layer in block))


def measured(net, x, **settings):
    torch._dynamo.reset()
    return saved_for_backward(compiled(net, **settings), net, x)


@pytest.mark.parametrize(("name", "shape", "goal"), GOALS, ids=[name for name, *_ in GOALS])
def test_saved_bytes_are_those_of_the_fused_network(name, shape, goal, capsys):
    row = measure(model(name), shape)
    with capsys.disabled():
        print("\n" + tabulate([[name, *(f"{n / MIB:.2f}" for n in row.values())]], headers=["saved, MiB", *row]))
    assert row["Tune"] <= goal * MIB
    assert row["Tune"] <= row["fused network"] * 1.001
    assert row["Tune"] < row["Inductor Eval"] < row["eager Eval"]


CONVNEXT_ATTO = 2 * 40 * 56**2 + 2 * 80 * 28**2 + 6 * 160 * 14**2 + 2 * 320 * 7**2
DINOV2_SMALL_OF_4_BLOCKS = 2 * 4 * 384 * (16**2 + 1)


@pytest.mark.parametrize(
    ("name", "options", "scaled"),
    [
        ("convnext_atto", {}, CONVNEXT_ATTO),
        ("vit_small_patch14_dinov2", {"img_size": 224, "depth": 4}, DINOV2_SMALL_OF_4_BLOCKS),
    ],
)
def test_layer_scale_does_not_keep_what_it_scales(name, options, scaled):
    """After a convolution, or after a linear layer of tokens; not one byte of those outputs is saved."""
    network, x = timm.create_model(name, **options).to("meta").eval(), torch.empty(2, 3, 224, 224, device="meta")
    report = convbn_compile.explain(network, x)
    assert report.saved_bytes_before - report.saved_bytes_after == 2 * 4 * scaled


def on_meta(network, *shape, **settings):
    """explain's bytes before and after, without running anything."""
    report = convbn_compile.explain(network.to("meta").eval(), torch.empty(shape, device="meta", **settings))
    return report.saved_bytes_before, report.saved_bytes_after


def test_masks_go_below_the_fused_network():
    """92 MiB are saved of the fused network, and 105 by PyTorch's own pass."""
    before, after = on_meta(timm.create_model("efficientnet_lite0"), 16, 3, 96, 96)
    assert before >= 150 * MIB
    assert after <= 76 * MIB


def test_of_what_is_frozen_only_signs_are_saved():
    """Autograd and Inductor keep the inputs of frozen convolutions, too."""
    network = resnet.ResNet(resnet.Bottleneck, [1, 2, 1, 1]).requires_grad_(requires_grad=False)
    network.conv1.requires_grad_()
    network.bn1.requires_grad_()
    before, after = on_meta(network, 2, 3, 96, 96)
    assert before > 6 * MIB
    assert after <= 0.06 * before


def small_resnet():
    return randomise(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1]))


NETS = {
    "densenet": lambda: densenet.DenseNet(block_config=(1, 2)),
    "mnasnet": lambda: mnasnet.MNASNet(0.5).layers[:9],
    "mobilenet_v2": lambda: mobilenetv2.MobileNetV2().features[:4],
    "mobilenet_v3_small": lambda: mobilenetv3.mobilenet_v3_small().features[:6],
    "regnet_y": lambda: regnet.RegNet(regnet.BlockParams([1, 2], [16, 32], [8, 8], [1.0, 1.0], [2, 2], se_ratio=0.25)),
    "shufflenet_v2": lambda: shufflenetv2.ShuffleNetV2([2, 1, 1], [24, 48, 96, 192, 256]),
}


@pytest.mark.parametrize("name", NETS)
def test_never_above_plain_inductor(name):
    """With blocks of each kind that a network has."""
    report = convbn_compile.explain(randomise(NETS[name]()), torch.randn(2, 3, 64, 64))
    assert report.folded
    assert report.saved_bytes_after <= report.saved_bytes_before


@pytest.mark.filterwarnings("ignore:convbn_tune folded no batch norm")
@pytest.mark.parametrize("trained", ["conv", "norm", "input", "gamma of the last", "everything"])
def test_never_above_plain_inductor_when_partly_frozen(trained):
    net = nn.Sequential(*(pair(nn.Conv2d(8, 8, 3, padding=1)) for _ in range(3)), nn.ReLU()).requires_grad_(False)
    x = torch.randn(2, 8, 16, 16, dtype=torch.float64)
    if trained == "input":
        x.requires_grad_()
    for block in net[:3]:
        block[0].requires_grad_(trained in ("conv", "everything"))
        block[1].requires_grad_(trained in ("norm", "everything"))
    if trained == "gamma of the last":
        net[2][1].weight.requires_grad_()
    assert measured(net, x) <= measured(net, x, mode="eval")


def test_never_above_plain_inductor_where_weights_are_larger_than_activations():
    net = randomise(
        nn.Sequential(*(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64)) for _ in range(3)))
    )
    x = torch.randn(1, 64, 2, 2)
    assert measured(net, x, fold="always") <= measured(net, x, mode="eval")
    assert measured(net, x, fold="always") < 64 * 64 * 9 * 4  # less than one folded weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_saves_no_more_than_plain_inductor(dtype):
    net = randomise(
        nn.Sequential(*(nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(3)))
    )
    x = torch.randn(2, 16, 12, 12)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        assert measured(net, x) < measured(net, x, mode="eval")


def test_explain_counts_what_is_measured():
    net, x = small_resnet(), torch.randn(2, 3, 64, 64)
    report = convbn_compile.explain(net, x)
    assert report.saved_bytes_before == measured(net, x, mode="eval")
    assert report.saved_bytes_after == measured(net, x)


def test_inductor_saves_what_aot_eager_does():
    """Plain Inductor saves weights and inputs a second time, in channels_last; a fold of ours does not."""
    net = randomise(blocks(8, padding=1))
    x = torch.randn(2, 8, 16, 16)
    assert measured(net, x, lowering="inductor") == measured(net, x)
    assert measured(net, x, lowering="inductor") < measured(net, x, lowering="inductor", mode="eval")


def test_memory_budget_is_of_this_compile_only():
    net, x = small_resnet(), torch.randn(2, 3, 64, 64)
    full, half = measured(net, x), measured(net, x, memory_budget=0.5)
    assert half <= 0.6 * full
    assert measured(net, x) == full
    assert options(memory_budget=0.5).memory_budget == 0.5


def test_memory_budget_changes_no_number():
    net, x = small_resnet().double(), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with counted() as counts:
        wanted, found = net(x), compiled(net, memory_budget=0.5, fold="always")(x)
    assert counts.folded == 12
    torch.testing.assert_close(found, wanted)

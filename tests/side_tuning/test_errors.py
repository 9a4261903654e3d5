"""What attach refuses, and says."""

import re
from functools import partial

import pytest
import timm
import torch
import torchvision
from reversible.nets import Residual, image, make, mlp
from side_tuning.test_attach import RESNET, trained
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from convbn_compile.side_tuning import attach, handle_of


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank: an integer of 1 or more is needed, got 0"),
        ({"rank": 512}, ValueError, "rank must be below the width of what is tapped, and layer2.1 has 512"),
        ({"rank": 2.0}, TypeError, "rank: an integer of 1 or more is needed, got 2.0"),
        ({"start": 9}, ValueError, 'start must be "middle" or from 0 to 8, of 9 blocks, got 9'),
        ({"start": -1}, ValueError, "got -1"),
        ({"start": 8}, ValueError, "No block from start = 8 on keeps the shape of its input (layer4.0 and after)"),
        ({"start": "end"}, TypeError, "start must be the number of a block or \"middle\", got 'end' (str)"),
        ({"plus": 3}, TypeError, "plus must be True or False, got 3 (int)"),
        ({"kernel_size": 4}, ValueError, "kernel_size must be odd, so that what is convolved keeps its place, got 4"),
        ({"swish_beta": 0}, ValueError, "swish_beta must be finite and above 0, got 0"),
        ({"swish_beta": "1"}, TypeError, "swish_beta must be a number, got '1' (str)"),
        ({"blocks": "layer3"}, TypeError, "blocks is a list, such as [\"layer3\"], got 'layer3'"),
        ({"blocks": ["layer5"]}, ValueError, "attach: the model has no module 'layer5'"),
        ({"blocks": [["layer3.1", "layer3.3"]]}, ValueError, "the blocks of a list in blocks follow each other"),
        ({"head": "classifier"}, ValueError, "head: the model has no module 'classifier'"),
        ({"head": [3]}, TypeError, "head is the path of a module, or a list of paths, got 3 (int)"),
        ({"head": 3}, TypeError, "head is the path of a module, or a list of paths, got 3 (int)"),
        ({"head": ""}, ValueError, "head: '' is the whole model"),
        ({"head": "layer1.0.conv1"}, ValueError, "head: layer1.0.conv1 is trained, but layer1.0 is frozen"),
        ({"head": "layer2"}, ValueError, "head: layer2 is trained, but layer2.0 is frozen"),
    ],
    ids=str,
)
def test_errors(arguments, error, message):
    net = make(RESNET)
    with pytest.raises(error, match=re.escape(message)):
        attach(net, **{"start": 1, **arguments})
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all("forward" not in module.__dict__ for module in net.modules())


def test_more_errors():
    with pytest.raises(TypeError, match="attach needs a torch.nn.Module, got 3"):
        attach(3)
    known = (
        r"no blocks of a known class in torch\.nn.*\.Linear\. Known are timm\.models\.beit\.Block, .*resnet\.Bottleneck"
    )
    with pytest.raises(ValueError, match=known):
        attach(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"0 \(Tanh\) has to begin with a Conv2d, BatchNorm2d, Linear or LayerNorm"):
        attach(nn.Sequential(nn.Tanh(), nn.Linear(3, 3)), blocks=[["0"]])
    net, handle = trained()
    with pytest.raises(ValueError, match="side-tuned already"):
        attach(net)
    with pytest.raises(ValueError, match="Attach first, wrap afterwards"):
        attach(wrapped(make(RESNET)))
    handle.detach()
    with pytest.raises(ValueError, match="the model is not side-tuned"):
        handle_of(net)


def a_hook(*_):
    """As others leave them on blocks."""


@pytest.mark.parametrize(
    "kind",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks(kind):
    """Before and after; their names are told."""
    net = make(RESNET)
    hook = getattr(net.layer3[2], kind)(partial(a_hook))
    with pytest.raises(ValueError, match=r"layer3\.2 has hooks, which would .* Hooks: .*test_errors\.a_hook\."):
        attach(net)
    hook.remove()
    attach(net)
    getattr(net.layer3[2], kind)(a_hook)
    with pytest.raises(RuntimeError, match=r"layer3\.2 is side-tuned and has hooks \(.*test_errors\.a_hook\), which"):
        net(image())


def wrapped(net):
    """In DistributedDataParallel, without a process group."""
    ddp = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(ddp)
    ddp.module = net
    return ddp


def test_an_attribute_of_the_name():
    """Nothing is left half changed."""
    net = make(RESNET)
    net.side_network = 3
    with pytest.raises(ValueError, match="the model has an attribute side_network"):
        attach(net)
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all("forward" not in module.__dict__ for module in net.modules())


def test_a_block_that_is_called_twice():
    block = make("timm ViT").blocks[0]
    with pytest.raises(ValueError, match=re.escape("1 is the same module as 0. Leave it out by blocks")):
        attach(nn.Sequential(block, block, nn.Linear(16, 2)))


def test_tied_heads():
    net = nn.Sequential(nn.Linear(6, 6), *(Residual(mlp()) for _ in range(2)), nn.Linear(6, 6))
    net[3].weight = net[0].weight
    with pytest.raises(ValueError, match=re.escape("head: 3.weight is 0.weight of the backbone, too")):
        attach(net, blocks=[["1", "2"]])


def test_a_head_of_integers():
    """Nothing is left half changed."""
    net = nn.Sequential(Residual(mlp()), nn.Linear(6, 2))
    net[1].register_parameter("codes", nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False))
    with pytest.raises(ValueError, match=re.escape("head: 1.codes is torch.int8, and cannot be trained")):
        attach(net, blocks=[["0"]])
    assert all(parameter.requires_grad for name, parameter in net.named_parameters() if name != "1.codes")
    assert not hasattr(net, "side_network")


class HeadFirst(nn.Module):
    """Registered before the blocks."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 2)
        self.blocks = nn.Sequential(*(Residual(mlp()) for _ in range(2)))


def test_heads():
    assert attach(make("timm ConvNeXt")).head == ("head.fc",)
    assert attach(make("torchvision ConvNeXt")).head == ("classifier.2",)
    assert attach(make("torchvision ViT")).head == ("heads.head",)
    assert attach(make(RESNET), head=["fc", "layer4"]).head == ("fc", "layer4")
    assert attach(HeadFirst(), blocks=["blocks"]).head == ("head",)
    net = make(RESNET)
    net.fc = nn.Identity()
    assert attach(net, head=[]).head == ()
    net = make("timm ViT")
    net.reset_classifier(0)
    with pytest.warns(UserWarning, match=r"attach found no head in VisionTransformer, .* pass head=\[\] for none"):
        assert attach(net).head == ()


def test_a_layer_beside_the_head():
    net = nn.Sequential(Residual(mlp()), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.warns(UserWarning, match=re.escape("attach takes 3 for the head, and freezes 1 beside it. Name all")):
        handle = attach(net, blocks=[["0"]])
    handle.detach()
    attach(net, blocks=[["0"]], head=["1", "3"])  # without a warning


@pytest.mark.parametrize(
    "arguments",
    [{"dynamic_img_size": True}, {"patch_drop_rate": 0.1}, {"dynamic_img_pad": True}, {"strict_img_size": False}],
)
def test_grids_that_change(arguments):
    if "strict_img_size" in arguments:
        arguments = {"embed_layer": partial(timm.layers.PatchEmbed, **arguments)}
    net = timm.models.vision_transformer.VisionTransformer(32, 8, embed_dim=16, depth=2, num_heads=4, **arguments)
    with pytest.raises(ValueError, match="has to be the same for all images, but"):
        attach(net, plus=True)
    attach(net)


def test_channels_of_norms():
    """The LayerNorm2d of timm and torchvision have them in dimension 1."""
    for norm in (timm.layers.LayerNorm2d(6), torchvision.models.convnext.LayerNorm2d(6)):
        net = nn.Sequential(Residual(nn.Sequential(norm, nn.Conv2d(6, 6, 1))), nn.Conv2d(6, 2, 1))
        attach(net, blocks=[["0"]], head="1")
        net(torch.randn(2, 6, 4, 5)).sum().backward()

"""attach and its handle: what is frozen, what is trained, what is kept, the way back, and errors."""

import copy
import io
import pickle
import re

import pytest
import timm
import torch
import torchvision
from reversible.nets import Residual, image, make, mlp
from support import relative_errors, run
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

from convbn_compile import freeze_batch_norm
from convbn_compile.side_tuning import attach, handle_of

RESNET = "torchvision bottlenecks"


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


def trained(name=RESNET, **arguments):
    """A side-tuned network with nothing at 0."""
    net = make(name)
    handle = attach(net, **arguments)
    with torch.no_grad():
        for parameter in handle.side_network.parameters():
            parameter.normal_(std=0.1)
    return net, handle


@pytest.mark.parametrize(
    ("name", "arguments", "number"),
    [
        ("vit_base_patch16_224", {}, 36_864),
        ("vit_base_patch16_224", {"plus": True, "kernel_size": 3}, 43_776),
        ("vit_base_patch16_224", {"plus": True}, 56_064),
        ("swin_base_patch4_window7_224", {"rank": 4, "start": 14}, 90_112),
        ("swin_base_patch4_window7_224", {"rank": 4, "start": 14, "plus": True}, 128_512),
        ("resnet50", {"rank": 4, "start": 0}, 90_112),
        ("resnet50", {"rank": 4, "start": 8, "plus": True, "kernel_size": 3}, 73_728 + 27_648),
    ],
)
def test_numbers_of_parameters(name, arguments, number):
    """Of the paper for ViT-B and Swin-B, of its rule for ResNet-50."""
    with torch.device("meta"):
        net = timm.create_model(name)
    handle = attach(net, **arguments)
    assert count(handle.side_network.parameters()) == number
    assert count(handle.parameters()) == number + count(net.get_classifier().parameters())
    assert f"{number:,}" in str(handle) or len(str(handle).splitlines()) > 4


def test_str():
    net = make(RESNET)
    assert str(attach(net, rank=3, start=3)).splitlines() == [
        "DTL of rank 3 from block 3 of 9",
        "stage                   blocks    tapped    adapted    parameters",
        "--------------------  --------  --------  ---------  ------------",
        "layer1.0 to layer1.0         1         0          0             0",
        "layer2.0 to layer2.2         3         2          1         6,144",
        "layer3.0 to layer3.3         4         3          3        18,432",
        "layer4.0 to layer4.0         1         0          0             0",
    ]


@pytest.mark.parametrize("start", [0, 2, 5])
def test_blocks_before_the_start_are_outside_of_the_graph(start):
    net, handle = trained(start=start)
    inside = {}
    blocks = {path: index for index, path in enumerate(handle.blocks)}
    for path, module in net.named_modules():
        block = next((index for name, index in blocks.items() if path.startswith(f"{name}.")), None)
        if block is not None:
            module.register_forward_hook(lambda *call, block=block: inside.update({block: call[2].requires_grad}))
    net(image())
    first = next(i for i in range(start, 9) if handle.side_network.taps_block(i))
    assert inside == {block: block > first for block in range(9)}


def test_batch_norms_stay_in_eval_mode():
    net, handle = trained()
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    before = copy.deepcopy([list(norm.buffers()) for norm in norms])
    net.train()
    assert net.training and not any(norm.training for norm in norms)
    net(image()).sum().backward()
    for norm, buffers in zip(norms, before, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(norm.buffers(), buffers, strict=True))
    handle.detach()
    assert all(norm.training for norm in norms)


def test_what_is_frozen_before_stays_frozen_after():
    net = freeze_batch_norm(make(RESNET))
    net.conv1.requires_grad_(requires_grad=False)
    attach(net).detach().train()
    assert not net.bn1.training
    assert [name for name, one in net.named_parameters() if not one.requires_grad] == ["conv1.weight"]


def test_a_head_that_was_frozen_is_trained():
    net = make(RESNET).requires_grad_(False)
    handle = attach(net)
    assert all(parameter.requires_grad for parameter in handle.parameters())
    handle.detach()
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_the_way_back():
    net = make(RESNET)
    x, keys = image(), list(net.state_dict())
    wanted = run(net, net, x)
    handle = attach(net, plus=True)
    assert [key for key in net.state_dict() if not key.startswith("side_network.")] == keys
    assert handle.attached and handle_of(net) is handle
    assert handle.detach() is net and not handle.attached
    assert handle.detach() is net
    assert list(net.state_dict()) == keys
    assert not any(relative_errors(run(net, net, x), wanted).values())
    assert attach(net).attached


def test_a_state_dict():
    net, handle = trained(plus=True, kernel_size=3)
    file = io.BytesIO()
    torch.save(handle.state_dict(), file)
    tensors = sum(one.numel() * one.element_size() for one in handle.parameters())
    assert len(file.getvalue()) <= tensors + 20_000
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = make(RESNET)
    other.fc = nn.Linear(other.fc.in_features, 5).double()  # a head of its own
    attach(other, plus=True, kernel_size=3).load_state_dict(state)
    x = image()
    assert torch.equal(other(x), net(x))


def test_a_state_dict_of_something_else():
    net, handle = trained()
    state = handle.state_dict()
    other = make(RESNET)
    with torch.no_grad():
        other.layer1[0].bn1.running_mean[0] += 1e-6
    with pytest.raises(ValueError, match="trained on another network: its backbone are"):
        attach(other).load_state_dict(state)
    with pytest.raises(ValueError, match=r"its settings are .*'rank': 2.* Call attach with those"):
        attach(make(RESNET), rank=3).load_state_dict(state)
    with pytest.raises(ValueError, match="its blocks are"):
        attach(make(RESNET), blocks=["layer3"], start=3).load_state_dict(
            {**state, "settings": {**state["settings"], "start": 3}}
        )
    with pytest.raises(ValueError, match=re.escape("fc.bias: a tensor of shape (5,) is needed, got None")):
        handle.load_state_dict({**state, "tensors": {k: v for k, v in state["tensors"].items() if k != "fc.bias"}})
    with pytest.raises(ValueError, match=re.escape("got ['fc.weight']")):
        handle.load_state_dict({"fc.weight": 1})


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_a_handle_of_its_own(twin):
    net, handle = trained()
    other, x = twin(net), image()
    assert torch.equal(other(x), net(x))
    with torch.no_grad():
        for parameter in handle_of(other).side_network.parameters():
            parameter.zero_()
    assert not torch.equal(other(x), net(x))
    handle_of(other).detach()
    assert handle.attached


@pytest.mark.parametrize("name", ["torchvision bottlenecks", "timm ViT", "timm Swin", "timm ConvNeXt", "timm RegNet"])
@pytest.mark.parametrize("plus", [False, True])
def test_compiled(name, plus):
    """As one graph."""
    net, handle = trained(name, plus=plus, kernel_size=3, start=1)
    net.train()
    for module in net.modules():
        if isinstance(module, (nn.Dropout, timm.layers.DropPath)):
            module.eval()
    x = image()
    wanted = run(net, net, x)
    function = torch.compile(net, backend="convbn_tune", fullgraph=True, options={"lowering": "aot_eager"})
    errors = relative_errors(run(function, net, x), wanted)
    assert max(errors.values()) <= 1e-10


def test_other_layers_may_be_trained():
    """Behind the start; a detector's neck, for example."""
    net, handle = trained(start=2)
    net.layer4.requires_grad_()
    net(image()).sum().backward()
    assert net.layer4[0].conv1.weight.grad is not None


def test_what_is_frozen_must_not_be_trained():
    net, handle = trained(start=4)
    with pytest.raises(ValueError, match=r"input of layer1\.0 requires grad, but blocks up to layer3\.1 are frozen"):
        net(image().requires_grad_())
    net.layer1.requires_grad_()
    with pytest.raises(ValueError, match=r"parameters of layer1\.0 require grad"):
        net(image())
    with torch.no_grad():
        net(image())


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
    with pytest.raises((RuntimeError, TypeError), match="side-tuned|HandedOn"):
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
        attach(net, blocks=[["0", "1", "2"]], start=0)
        return net

    with pytest.raises(ValueError, match=re.escape("2 makes (3, 5) of (3, 6)")):
        make_with(nn.Linear(6, 5))(torch.randn(3, 6))
    with pytest.raises(ValueError, match="2 modifies its input in place, which its tap needs"):
        make_with(nn.ReLU(inplace=True))(torch.randn(3, 6))
    net = nn.Sequential(Residual(nn.Sequential(nn.Conv2d(4, 4, 1))), nn.Conv2d(4, 2, 1))
    attach(net, blocks=[["0"]])
    with pytest.raises(ValueError, match=r"taken to get 4 channels in dimension 1, .* but got \(2, 3, 4, 4\)"):
        net(torch.randn(2, 3, 4, 4))


def test_tokens_that_are_no_grid():
    net = nn.Sequential(*(Residual(mlp()) for _ in range(2)), nn.Linear(6, 2))
    attach(net, blocks=[["0", "1"]], plus=True)
    with pytest.raises(ValueError, match=re.escape("of tokens (2, 7, 6) it is known for ViTs")):
        net(torch.randn(2, 7, 6))
    net, _ = trained("timm ViT", plus=True)
    side = handle_of(net).side_network.convs["0"]
    side(torch.randn(1, 10, 16, dtype=torch.float64))  # another square
    with pytest.raises(ValueError, match=r"4 x 4 or a square, and of 12 tokens 1 are others: 11 patches are neither"):
        side(torch.randn(1, 12, 16, dtype=torch.float64))


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
    with pytest.raises(ValueError, match="attach found no residual blocks in Linear"):
        attach(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"0 \(Tanh\) has to begin with a Conv2d, BatchNorm2d, Linear or LayerNorm"):
        attach(nn.Sequential(nn.Tanh(), nn.Linear(3, 3)), blocks=[["0"]])
    net, handle = trained()
    with pytest.raises(ValueError, match="side-tuned already"):
        attach(net)
    handle.detach()
    net.layer3[1].register_forward_hook(lambda *call: None)
    with pytest.raises(ValueError, match=r"layer3\.1 has hooks, which would get what blocks hand on"):
        attach(net)
    with pytest.raises(ValueError, match="the model is not side-tuned"):
        handle_of(net)


def test_heads():
    assert attach(make("timm ConvNeXt")).head == ("head.fc",)
    assert attach(make("torchvision ConvNeXt")).head == ("classifier.2",)
    assert attach(make("torchvision ViT")).head == ("heads.head",)
    assert attach(make(RESNET), head=["fc", "layer4"]).head == ("fc", "layer4")
    assert attach(timm.create_model("resnet18", num_classes=0)).head == ()
    net = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=2)
    assert attach(net.backbone).head == ()

"""attach and its handle: what is frozen, what is trained, what is kept, the way back, and errors."""

import copy
import io
import pickle
import re
from fractions import Fraction

import pytest
import timm
import torch
from reversible.nets import Residual, image, make, mlp
from support import relative_errors, run
from torch import nn

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
    rows = [line.split() for line in str(handle).splitlines()[3:]]
    assert sum(int(row[-1].replace(",", "")) for row in rows) == number


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
    """Under no_grad, not only without a graph for want of something to train."""
    net, handle = trained(start=start)
    inside = {}
    blocks = {path: index for index, path in enumerate(handle.blocks)}

    def note(block, output):
        inside[block] = (torch.is_grad_enabled(), output.requires_grad)

    for path, module in net.named_modules():
        block = next((index for name, index in blocks.items() if path.startswith(f"{name}.")), None)
        if block is not None:
            module.register_forward_hook(lambda *call, block=block: note(block, call[2]))
    net(image())
    first = next(i for i in range(start, 9) if handle.side_network.at(i))
    assert handle.adapted == first
    assert inside == {block: (block > first, block > first) for block in range(9)}


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


def test_batch_norms_of_the_head_stay_in_eval_mode():
    """Of a pretrained network; they are trained, and at first change nothing."""
    net, x = make(RESNET).train(), image()
    handle = attach(net, head=["fc", "layer4.0.bn3"])
    with torch.no_grad():
        found = net.train()(x)
    assert not net.layer4[0].bn3.training
    assert any(parameter is net.layer4[0].bn3.weight for parameter in handle.parameters())
    net(x).sum().backward()
    assert net.layer4[0].bn3.weight.grad.abs().sum() > 0
    handle.detach()
    with torch.no_grad():
        assert torch.equal(net.eval()(x), found)


def test_other_norms_with_state():
    """Running statistics of instance norms, and what a spectral norm iterates."""
    norms = torch.nn.utils
    layers = [
        nn.InstanceNorm2d(6, track_running_stats=True),
        norms.spectral_norm(nn.Conv2d(6, 6, 1)),
        norms.parametrizations.spectral_norm(nn.Conv2d(6, 6, 1)),
    ]
    net = nn.Sequential(*(Residual(nn.Sequential(nn.Conv2d(6, 6, 1), one)) for one in layers), nn.Conv2d(6, 3, 1))
    handle = attach(net.train(), blocks=[["0", "1", "2"]], head="3")
    before = handle.fingerprint()
    net.train()(torch.randn(2, 6, 4, 4)).sum().backward()
    assert handle.fingerprint() == before
    handle.detach()
    assert all(one.training for one in layers)


class Counting(nn.Module):
    """Changes a buffer in train mode."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(6, 6)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen += 1
        return x + self.f(x)


def test_a_backbone_that_changes():
    net = nn.Sequential(Counting(), Counting(), nn.Linear(6, 2))
    handle = attach(net, blocks=[["0", "1"]])
    weights = copy.deepcopy(net.state_dict())
    net.eval()(torch.randn(2, 6))
    handle.state_dict()
    net.train()(torch.randn(2, 6))
    with pytest.raises(ValueError, match=r"not what it was at attach: 0\.seen, 1\.seen changed, as in train mode"):
        handle.state_dict()
    handle_of(copy.deepcopy(net)).state_dict()  # which has no past
    net.load_state_dict(weights)
    assert handle.state_dict()["backbone"] == handle.fingerprint()


def test_modes():
    """The side network has the model's."""
    assert not attach(make(RESNET).eval()).side_network.training
    assert attach(make(RESNET).train()).side_network.training


def test_detach_of_what_others_changed():
    net, handle = trained("timm ViT")
    mine = net.blocks[1].forward = lambda x: x
    del net.blocks[2].forward
    del net.side_network
    handle.detach()
    assert net.blocks[1].__dict__["forward"] is mine
    assert not handle.attached and all(parameter.requires_grad for parameter in net.parameters())


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
    with pytest.raises(ValueError, match="trained on another backbone: backbone '"):
        attach(other).load_state_dict(state)
    with pytest.raises(ValueError, match=r"with other settings: settings .*'rank': 2.* Call attach with those"):
        attach(make(RESNET), rank=3).load_state_dict(state)
    with pytest.raises(ValueError, match="trained on other blocks: blocks "):
        attach(make(RESNET), blocks=["layer3"], start=3).load_state_dict(
            {**state, "settings": {**state["settings"], "start": 3}}
        )
    with pytest.raises(ValueError, match=re.escape("fc.bias: a tensor of shape (5,) is needed, got None")):
        handle.load_state_dict({**state, "tensors": {k: v for k, v in state["tensors"].items() if k != "fc.bias"}})
    with pytest.raises(ValueError, match=re.escape("fc.gamma: there is no such tensor here")):
        handle.load_state_dict({**state, "tensors": {**state["tensors"], "fc.gamma": torch.ones(5)}})
    with pytest.raises(ValueError, match=re.escape("got ['fc.weight']")):
        handle.load_state_dict({"fc.weight": 1})
    for junk in (None, [1], {"fc.weight": 1}):
        with pytest.raises(ValueError, match="tensors by their names, got "):
            handle.load_state_dict({**state, "tensors": junk})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda bias: bias.to("meta"), "fc.bias: the tensor is on the meta device, without values"),
        (lambda bias: bias.int(), "fc.bias: a tensor of torch.float64 is needed, got torch.int32"),
        (lambda bias: bias.cfloat(), "fc.bias: a tensor of torch.float64 is needed, got torch.complex64"),
    ],
)
def test_a_state_is_loaded_as_a_whole(bad, message):
    net, handle = trained()
    x = image()
    wanted, state = net(x), copy.deepcopy(handle.state_dict())
    tensors = {name: tensor + 1 for name, tensor in state["tensors"].items()}
    assert list(tensors)[-1] == "fc.bias"
    with pytest.raises(ValueError, match=re.escape(message)):
        handle.load_state_dict({**state, "tensors": {**tensors, "fc.bias": bad(tensors["fc.bias"])}})
    assert torch.equal(net(x), wanted)


def test_a_head_with_other_state():
    class Head(nn.Linear):
        def get_extra_state(self):
            return torch.ones(1)

    net = nn.Sequential(Residual(mlp()), Head(6, 2))
    with pytest.raises(ValueError, match=r"1\._extra_state is no parameter or buffer of the head, and is not kept"):
        attach(net, blocks=[["0"]]).state_dict()


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


def test_other_layers_may_be_trained():
    """Behind the start; a detector's neck, for example."""
    net, handle = trained(start=2)
    net.layer4.requires_grad_()
    net(image()).sum().backward()
    assert net.layer4[0].conv1.weight.grad is not None


def test_what_is_frozen_must_not_be_trained():
    net, handle = trained(start=4)
    with pytest.raises(
        ValueError, match=r"input of layer1\.0 requires grad, but it is frozen and runs without a graph"
    ):
        net(image().requires_grad_())
    net.layer1.requires_grad_()
    with pytest.raises(ValueError, match=r"parameters of layer1\.0 require grad"):
        net(image())
    with torch.no_grad():
        net(image())


def test_a_detached_handle_is_of_no_other():
    net, handle = trained()
    state = handle.state_dict()
    handle.detach()
    attach(net)
    for call in (handle.parameters, handle.state_dict, lambda: handle.load_state_dict(state)):
        with pytest.raises(ValueError, match="The side network was detached"):
            call()


def test_parameters_that_were_replaced_are_released():
    net = make(RESNET)
    handle = attach(net)
    net.load_state_dict({name: tensor.clone() for name, tensor in net.state_dict().items()}, assign=True)
    handle.detach()
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_fingerprint_needs_values_and_no_others():
    net = make(RESNET)
    handle = attach(net)
    before = handle.fingerprint()
    net.register_buffer("scratch", torch.ones(1), persistent=False)
    assert handle.fingerprint() == before
    net.bn1.running_mean[0] += 1
    assert handle.fingerprint() != before
    with pytest.raises(ValueError, match=r"needs the values of bn1\.bias, which is a Tensor on meta"):
        handle_of(copy.deepcopy(net).to("meta")).state_dict()


def test_a_fingerprint_of_what_is_sharded():
    """Of a DTensor all of it."""

    class Sharded(torch.nn.Parameter):
        def detach(self):
            return self

        def full_tensor(self):
            return self.data.as_subclass(torch.Tensor)

    net = make(RESNET)
    handle = attach(net)
    before = handle.fingerprint()
    net.bn1.weight = Sharded(net.bn1.weight.data)
    assert handle.fingerprint() == before


def test_integers_of_numpy_are_integers():
    class Two(int):
        """Not what torch.load takes with weights_only=True."""

    handle = attach(make(RESNET), rank=Two(2), start=Two(2), kernel_size=Two(3), swish_beta=Fraction(5))
    settings = vars(handle.settings).values()
    assert [type(value) for value in settings] == [int, int, bool, int, float]
    assert list(settings) == [2, 2, False, 3, 5.0]


def test_each_tap_is_as_its_block():
    """In dtype; where blocks differ, the sum follows."""
    net = nn.Sequential(*(Residual(nn.Linear(6, 6)) for _ in range(3)), nn.Linear(6, 2))
    net[:2].double()
    handle = attach(net, blocks=[["0", "1"], ["2"]], start=0)
    taps = handle.side_network.taps
    assert [taps[name].a.weight.dtype for name in taps] == [torch.float64, torch.float64, torch.float32]

"""share_backbone: what models of several tasks return, and what is computed once."""

import copy

import pytest
import timm
import torch
from reversible.nets import NETS, image, make
from support import relative_errors
from torch import nn

from convbn_compile.side_tuning import attach, handle_of, share_backbone
from convbn_compile.side_tuning import handle as handle_module


def tasks(name, starts, **arguments):
    """Models of one backbone with heads and side networks of their own."""
    handles = []
    for number, start in enumerate(starts):
        net = make(name)
        handle = attach(net, start=start, rank=number + 1, **arguments)
        head = net.get_submodule(handle.head[0])
        net.set_submodule(handle.head[0], nn.Linear(head.in_features, number + 2).double())
        with torch.no_grad():
            for parameter in handle.side_network.parameters():
                parameter.normal_(std=0.1)
        handles.append(handle)
    return handles


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("plus", [False, True])
def test_it_returns_what_the_models_return(name, plus):
    handles, x = tasks(name, (2, 1, 2), plus=plus, kernel_size=3), image()
    shared = share_backbone(handles)
    with torch.no_grad():
        found, wanted = shared(x), [handle.model(x) for handle in handles]
    assert [output.shape[1] for output in found] == [2, 3, 4]
    for output, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(output, want, rtol=1e-10, atol=1e-10)


def test_what_is_common_is_computed_once():
    handles = tasks("torchvision bottlenecks", (4, 5))
    shared, sizes = share_backbone(handles), {}
    for path, module in shared.named_modules():
        if path.startswith(("conv1", "layer")) and path.endswith("conv1"):
            module.register_forward_pre_hook(lambda *call, path=path: sizes.update({path: len(call[1][0])}))
    shared(image(batch=2))
    before = ["conv1", "layer1.0.conv1", "layer2.0.conv1", "layer2.1.conv1", "layer2.2.conv1", "layer3.0.conv1"]
    assert [path for path, batch in sizes.items() if batch == 2] == [*before, "layer3.1.conv1"]
    assert [path for path, batch in sizes.items() if batch == 4] == [
        "layer3.2.conv1",
        "layer3.3.conv1",
        "layer4.0.conv1",
    ]


def test_parameters_are_shared():
    handles, x = tasks("timm ViT", (1, 1)), image()
    shared = share_backbone(handles)
    own = {id(parameter) for handle in handles for parameter in handle.model.parameters()}
    assert all(id(parameter) in own for parameter in shared.parameters())
    with torch.no_grad():
        handles[1].side_network.taps["0"].c.weight.mul_(2)
        torch.testing.assert_close(shared(x)[1], handles[1].model(x), rtol=1e-10, atol=1e-10)


def test_modes_are_not_shared():
    handles = tasks("timm ViT", (1, 1))
    for handle in handles:
        handle.model.train()
    shared = share_backbone(handles).eval()
    assert all(module.training for handle in handles for module in handle.model.modules())
    assert not any(module.training for module in shared.modules())


def test_compiled():
    handles, x = tasks("torchvision bottlenecks", (4, 5)), image()
    shared = share_backbone(handles)
    function = torch.compile(shared, backend="convbn_tune", fullgraph=True, options={"lowering": "aot_eager"})
    with torch.no_grad():
        for found, wanted in zip(function(x), shared(x), strict=True):
            assert max(relative_errors({"": found}, {"": wanted}).values()) <= 1e-10


def test_errors():
    handles = tasks("timm ViT", (1, 1))
    with pytest.raises(TypeError, match="share_backbone needs a list of what attach returned, got 3"):
        share_backbone(3)
    with pytest.raises(ValueError, match="two handles or more, got 1"):
        share_backbone(handles[:1])
    with pytest.raises(ValueError, match=r"handles\[0\] and handles\[1\] have other blocks"):
        share_backbone([handles[0], attach(make("timm ViT"), blocks=[["blocks.0", "blocks.1"]], head="head")])
    with pytest.raises(ValueError, match=r"That of handles\[0\] is \('head',\), that of handles\[1\] \(\)"):
        share_backbone([handles[0], attach(make("timm ViT"), head=[])])
    other = copy.deepcopy(handles[1].model)
    with torch.no_grad():
        other.norm.bias[0] += 1
    with pytest.raises(ValueError, match="have other weights"):
        share_backbone([handles[0], handle_of(other)])
    handles[1].detach()
    with pytest.raises(ValueError, match=r"handles\[1\] was detached"):
        share_backbone(handles)


def test_models_that_compute_different_things():
    """Of the same weights."""
    handles = tasks("timm ViT", (1, 1))
    handles[1].model.global_pool = "avg"
    with pytest.raises(ValueError, match="handles\\[0\\] and .* global_pool of the model is 'token' and 'avg'"):
        share_backbone(handles)
    handles = tasks("timm ViT", (1, 1))
    handles[1].model.blocks[0].attn.scale *= 2
    with pytest.raises(ValueError, match=r"scale of blocks\.0\.attn is 0\.5 and 1\.0"):
        share_backbone(handles)
    handles = tasks("timm ResNet", (1, 1))
    handles[1].model.global_pool.pool = nn.AdaptiveMaxPool2d(1)
    with pytest.raises(ValueError, match=r"the class of global_pool\.pool is '.*AvgPool2d' and '.*MaxPool2d'"):
        share_backbone(handles)
    handles = tasks("torchvision bottlenecks", (1, 1))
    handles[1].model.relu = nn.Sequential(nn.ReLU())
    with pytest.raises(ValueError, match=r"the class of relu is "):
        share_backbone(handles)
    handles = tasks("torchvision Swin", (1, 1))
    handles[1].model.features[1][1].attn.shift_size = [0, 0]
    with pytest.raises(ValueError, match=r"shift_size of features\.1\.1\.attn is \[2, 2\] and \[0, 0\]"):
        share_backbone(handles)


def test_heads_may_differ():
    """And so may marks of torch.compile and transformers, and checkpoints."""
    handles = tasks("timm ViT", (1, 1))
    torch.compile(handles[1].model, backend="eager")
    handles[1].model.blocks[0].compile(backend="eager")
    handles[1].model.norm._is_hf_initialized = True
    handles[1].model.set_grad_checkpointing()
    handles[1].model.num_classes = 3
    handles[1].model.head = nn.Sequential(nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    assert [output.shape[1] for output in share_backbone(handles)(image())] == [2, 3]


@pytest.mark.parametrize("first", [True, False])
def test_the_grid_is_that_of_the_shared_model(first):
    """Of all tasks, also where the first one has none."""
    handles = tasks("timm ViT", (1, 1), plus=True, kernel_size=3)
    if not first:
        handles[0] = tasks("timm ViT", (1,))[0]
    shared = share_backbone(handles)
    x = torch.randn(2, 3, 16, 64, dtype=torch.float64)
    for model in (shared, *(handle.model for handle in handles)):
        model.set_input_size((16, 64))
    with torch.no_grad():
        for found, handle in zip(shared(x), handles, strict=True):
            torch.testing.assert_close(found, handle.model(x), rtol=1e-10, atol=1e-10)


def test_a_grid_is_asked_for_by_convolutions_only():
    """DTL takes images of any size."""
    net = timm.models.vision_transformer.VisionTransformer(
        32, 8, embed_dim=16, depth=2, num_heads=4, num_classes=5, dynamic_img_size=True
    )
    shared = share_backbone([attach(model) for model in (net, copy.deepcopy(net))])
    assert [output.shape[1] for output in shared(torch.randn(2, 3, 16, 48))] == [5, 5]


def test_grids_that_differ():
    handles = tasks("timm ViT", (1, 1), plus=True, kernel_size=3)
    handles[1].model.patch_embed.grid_size = (2, 8)
    with pytest.raises(ValueError, match=r"grid_size of patch_embed is \(4, 4\) and \(2, 8\)"):
        share_backbone(handles)


def test_each_model_is_hashed_once(monkeypatch):
    handles, hashed = tasks("timm ViT", (1, 1, 1)), []
    real = handle_module.fingerprint
    monkeypatch.setattr(handle_module, "fingerprint", lambda model, _: hashed.append(model) or real(model, _))
    share_backbone(handles)
    assert hashed == [handle.model for handle in handles]


def test_to_moves_the_parameters_of_the_models():
    handles = tasks("timm ViT", (1, 1))
    share_backbone(handles).float()
    for handle in handles:
        assert {parameter.dtype for parameter in handle.model.head.parameters()} == {torch.float32}
        assert {parameter.dtype for parameter in handle.side_network.parameters()} == {torch.float32}
    assert handles[0].model.blocks[0].norm1.weight.dtype == torch.float32

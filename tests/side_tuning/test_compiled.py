"""Side-tuned networks through Dynamo: whole, with checkpoints, and block by block."""

import copy
import pickle

import pytest
import timm
import torch
from reversible.nets import Residual, image, mlp, resnet_of
from side_tuning.test_attach import trained
from support import relative_errors, run
from torch import nn
from torchvision.models import resnet

from convbn_compile.side_tuning import attach


def in_train_mode(name, **arguments):
    """With dropout and drop path off."""
    net, _ = trained(name, **arguments)
    net.train()
    for module in net.modules():
        if isinstance(module, (nn.Dropout, timm.layers.DropPath)):
            module.eval()
    return net


NETS = [
    ("torchvision bottlenecks", True),
    ("timm ViT", True),
    ("timm Swin", True),
    ("timm ConvNeXt", False),
    ("timm ViT", False),
]


@pytest.mark.parametrize(("name", "plus"), NETS)
def test_compiled(name, plus):
    """As one graph."""
    net, x = in_train_mode(name, plus=plus, kernel_size=3, start=1), image()
    wanted = run(net, net, x)
    function = torch.compile(net, backend="convbn_tune", fullgraph=True, options={"lowering": "aot_eager"})
    assert max(relative_errors(run(function, net, x), wanted).values()) <= 1e-10


def test_with_checkpoints():
    net, x = in_train_mode("timm ViT", start=1), image()
    wanted = run(net, net, x)
    net.set_grad_checkpointing()
    for function in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        assert max(relative_errors(run(function, net, x), wanted).values()) <= 1e-10


def alternating():
    """Two stages of two kinds of blocks in turn, as those of Swin."""
    stages = (nn.Sequential(*(Residual(mlp() if i % 2 else nn.Linear(6, 6)) for i in range(9))) for _ in range(2))
    return nn.Sequential(nn.Flatten(2), nn.Linear(32 * 32, 6), *stages, nn.Linear(6, 3))


MANY_BLOCKS = {
    "ResNet": (lambda: resnet_of(resnet.Bottleneck, (3, 4, 6, 3)), {}),
    "alternating": (alternating, {"blocks": ["2", "3"], "start": 5}),
    "ViT": (lambda: timm.models.vision_transformer.VisionTransformer(32, 8, embed_dim=16, num_heads=4), {}),
}


@pytest.mark.parametrize(("name", "graphs"), [("ResNet", 13), ("alternating", 17), ("ViT", 7)])
def test_block_by_block(name, graphs):
    """None is left to eager mode, and blocks share graphs: the number of those is not that of the blocks."""
    make, arguments = MANY_BLOCKS[name]
    net = make().double().eval()
    handle = attach(net, **arguments)
    with torch.no_grad():
        for parameter in handle.side_network.parameters():
            parameter.normal_(std=0.1)
    x, made, called = image(), [], []
    wanted = run(net, net, x)

    def backend(graph, _):
        made.append(graph)
        return lambda *args: called.append(graph) or graph(*args)

    for block in handle.all_blocks:
        block.module.compile(backend=backend, fullgraph=True)
    net(x)
    called.clear()
    assert max(relative_errors(run(net, net, x), wanted).values()) <= 1e-12
    assert len(called) == len(handle.blocks)
    assert len(made) <= graphs


def test_a_copy_has_code_of_its_own():
    """Dynamo counts what it compiles for each code object."""
    net, _ = trained("timm ViT")
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        one, other = (each.blocks[2].forward.func.__code__ for each in (net, twin))
        assert one is not other

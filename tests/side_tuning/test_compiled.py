"""Side-tuned networks through Dynamo: whole, with checkpoints, and block by block."""

import pytest
import timm
import torch
from reversible.nets import image
from side_tuning.test_attach import trained
from support import relative_errors, run
from torch import nn
from torch._dynamo.testing import CompileCounter

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


def test_block_by_block():
    """Blocks share graphs: the number of those does not grow with the number of blocks."""
    net = timm.models.vision_transformer.VisionTransformer(32, 8, embed_dim=16, depth=12, num_heads=4, num_classes=5)
    attach(net, plus=True, kernel_size=3)
    x, counter = image().float(), CompileCounter()
    wanted = net(x)
    for block in net.blocks:
        block.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(net(x), wanted)
    assert counter.frame_count <= 8

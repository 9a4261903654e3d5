"""Saved bytes: less with each block that is not adapted, and little where what is frozen is folded."""

import pytest
import timm
import torch
from reversible.nets import image, make

from convbn_compile import estimate_memory
from convbn_compile.measure import saved_for_backward
from convbn_compile.side_tuning import attach


@pytest.mark.parametrize("name", ["timm ViT", "timm Swin", "torchvision bottlenecks", "timm ConvNeXt"])
def test_less_with_each_block_that_is_not_adapted(name):
    x, found = image(), []
    for start in range(7):
        net = make(name)
        try:
            attach(net, start=start)
        except ValueError:
            break
        found.append(saved_for_backward(net, net, x))
    assert len(found) > 2
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0]


GOALS = [("vit_base_patch16_224", 32, 2, 0.4), ("resnet50", 8, 4, 0.25)]


@pytest.mark.parametrize(("name", "batch", "rank", "goal"), GOALS, ids=[name for name, *_ in GOALS])
def test_share_of_full_fine_tuning(name, batch, rank, goal):
    """Compiled, counted with fake tensors."""
    with torch.device("meta"):
        net = timm.create_model(name).eval()
    x = torch.empty(batch, 3, 224, 224, device="meta")
    full = estimate_memory(net, x).saved_bytes
    attach(net, rank=rank)
    assert estimate_memory(net, x).saved_bytes <= goal * full


def test_a_frozen_bottleneck_saves_bits():
    """In eager mode autograd keeps the inputs of frozen convolutions and norms."""
    block = make("torchvision bottlenecks").float().layer2[1].requires_grad_(requires_grad=False)
    x = torch.randn(8, 512, 12, 12, requires_grad=True)
    tuned = torch.compile(block, backend="convbn_tune", options={"lowering": "aot_eager"})
    plain = torch.compile(block, backend="aot_eager_decomp_partition")
    eager, plain, tuned = (saved_for_backward(function, block, x) for function in (block, plain, tuned))
    assert tuned <= 0.1 * x.numel() * 4
    assert tuned < plain < eager

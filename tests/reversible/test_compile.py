"""Blocks through the backend: batch norm folded inside, few graphs, the gradients of the uncompiled network."""

import copy

import pytest
import torch
from reversible.nets import Residual, image, make, resnet_of
from reversible.test_segment import assert_alike, both, step
from support import counted, randomise
from timm.models import resnet as timm_resnet
from torch import nn
from torchvision.models import resnet

from convbn_compile.reversible import make_reversible

AOT_EAGER = {"options": {"lowering": "aot_eager", "fold": "always"}}


def test_alike_blocks_share_graphs_and_fold():
    """Of eleven blocks: one graph for forward, one for what backward computes again."""
    handle, net, twin = both(
        randomise(resnet_of(resnet.Bottleneck, (1, 12, 1, 1))).double().eval(), alpha=0.3, beta=0.7
    )
    handle.compile(**AOT_EAGER)
    x = image()
    with counted() as counts:
        found = step(net, x)
    assert (counts.graphs, counts.folded, counts.refused) == (2, 6, [])
    assert_alike(found, step(twin, x))


def test_many_kinds_of_blocks_keep_to_the_recompile_limit():
    """Each kind has code of its own, so that none is left to eager because of the others."""
    net = nn.Sequential(*(Residual(mlp_of(width)) for width in range(2, 7))).double()
    handle = make_reversible(net, 0.3, 0.7, chains=[""])
    wanted = handle.gradient_error(rows := torch.randn(3, 6, dtype=torch.float64))
    handle.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=3):
        assert handle.gradient_error(rows) <= 10 * max(wanted, 1e-14)


def mlp_of(width):
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 6))


def test_other_coefficients_compile_nothing():
    handle, net, twin = both(make("torchvision ResNet"))
    handle.compile(**AOT_EAGER)
    x = image()
    step(net, x)
    with torch._dynamo.config.patch(error_on_recompile=True), counted() as counts:
        handle.set(0.6, 0.4)
        found = step(net, x)
    assert counts.graphs == 0
    twin.__dict__["_convbn_reversible"].set(0.6, 0.4)
    assert_alike(found, step(twin, x))


@pytest.mark.filterwarnings("ignore:convbn_tune folded no batch norm")
@pytest.mark.parametrize("lowering", ["aot_eager", "inductor"])
def test_running_statistics_and_dropout(lowering):
    torch.manual_seed(0)
    blocks = timm_resnet.ResNet(timm_resnet.BasicBlock, (1, 3, 1, 1), num_classes=5, drop_path_rate=0.1)
    handle, net, twin = both(randomise(blocks).double().train(), alpha=0.3, beta=0.7)
    handle.compile(options={"lowering": lowering} | ({"fallback_random": True} if lowering == "inductor" else {}))
    x = image(batch=4)
    assert_alike(step(net, x), step(twin, x))
    for found, wanted in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_rest_of_the_model_breaks_once_at_each_chain():
    """And where a stage has a graph of its own before its chain: torch goes on in the caller's frame only."""
    net = make("torchvision ResNet")
    plain, x = copy.deepcopy(net), image()
    handle = make_reversible(net)
    graphs = []

    def backend(gm, _):
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(net, backend=backend)
    output = compiled(x)
    assert len(graphs) <= len(handle.chains) + 2
    handle.set(1.0, 0.0)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x))
    assert output.requires_grad

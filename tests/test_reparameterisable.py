"""Re-parameterisable networks, with a few blocks of each kind: right, and they cost what timm's conversion leaves.

The whole ones are in the zoo.
"""

from dataclasses import replace

import pytest
import timm
import torch
from support import joint_graph, operators
from timm.models import byobnet, repghost
from timm.utils.model import reparameterize_model
from zoo import Entry, examine

from convbn_compile import joint_pass
from convbn_compile.saved_bytes import saved_bytes


def repvgg():
    config = byobnet.model_cfgs["repvgg_a0"]
    return byobnet.ByobNet(replace(config, blocks=[replace(stage, d=2) for stage in config.blocks[:2]]))


def mobileone():
    config = byobnet.model_cfgs["mobileone_s0"]
    return byobnet.ByobNet(replace(config, blocks=[stage[:2] for stage in config.blocks[:2]]))


def repghost_net():
    """Of kernel size, expansion, channels, squeeze and excite, stride."""
    stages = [[[3, 8, 16, 0, 1]], [[3, 24, 24, 0, 2]], [[5, 36, 40, 0.25, 2], [5, 60, 40, 0.25, 1]]]
    return repghost.RepGhostNet(stages, width=0.5)


MODELS = {
    "RepVGG": (repvgg, 5),
    "MobileOne": (mobileone, 15),
    "FastViT": (lambda: timm.create_model("fastvit_t8", layers=(1, 1), embed_dims=(48, 96)), 6),
    "RepViT": (lambda: timm.create_model("repvit_m0_9", depth=(2, 1), embed_dim=(48, 96)), 4),
    "RepGhostNet": (repghost_net, 0),
}
"""How each is made, and how many convolutions merge."""


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name):
    """Of all branches' parameters, in float64."""
    row = examine(Entry("timm", name, MODELS[name][0]))
    assert row.right, row


def rewritten(model):
    """Report, forward and backward convolutions, and saved bytes, for a batch that a GPU would train; nothing runs."""
    torch.compiler.reset()
    joint = joint_graph(model.to("meta"), torch.empty(32, 3, 224, 224, device="meta"))
    report = joint_pass.run(joint.graph)
    counts = operators(joint.graph)
    convolutions = counts["aten.convolution.default"], counts["aten.convolution_backward.default"]
    return report, convolutions, saved_bytes(joint.graph)


@pytest.mark.parametrize("name", MODELS)
def test_costs_what_the_converted_network_costs(name):
    make, merged = MODELS[name]
    model = make().eval()
    _, wanted, limit = rewritten(reparameterize_model(model).eval().requires_grad_())
    report, convolutions, saved = rewritten(model)
    assert report.merged == merged
    assert convolutions == wanted
    assert saved == pytest.approx(limit, rel=2e-3)

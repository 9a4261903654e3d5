"""Real re-parameterisable networks: right, and one convolution for each that timm's conversion for inference leaves."""

import pytest
import timm
import torch
from support import joint_graph, operators
from test_zoo import row_of
from timm.utils.model import reparameterize_model

from convbn_compile import joint_pass
from convbn_compile.saved_bytes import saved_bytes

MERGED = {"repvgg_a0": 22, "mobileone_s0": 148, "fastvit_t8": 16, "repvit_m0_9": 23, "repghostnet_050": 0}


@pytest.mark.parametrize("name", MERGED)
def test_gradients(name):
    """Of all branches' parameters, in float64."""
    row = row_of(name)
    assert row.right, row


def rewritten(model):
    """Report, forward and backward convolutions, and saved bytes, for a batch that a GPU would train; nothing runs."""
    torch.compiler.reset()
    joint = joint_graph(model.to("meta"), torch.empty(32, 3, 224, 224, device="meta"))
    report = joint_pass.run(joint.graph)
    counts = operators(joint.graph)
    convolutions = counts["aten.convolution.default"], counts["aten.convolution_backward.default"]
    return report, convolutions, saved_bytes(joint.graph)


@pytest.mark.parametrize("name", MERGED)
def test_costs_what_the_converted_network_costs(name):
    model = timm.create_model(name, num_classes=10).eval()
    _, wanted, limit = rewritten(reparameterize_model(model).eval().requires_grad_())
    report, convolutions, saved = rewritten(model)
    assert report.merged == MERGED[name]
    assert convolutions == wanted
    assert saved == pytest.approx(limit, rel=2e-3)

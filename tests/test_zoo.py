"""The quick models of the zoo; `make zoo` runs all of them."""

import dataclasses

import pytest
from zoo import examine, zoo

from convbn_compile import joint_pass
from convbn_compile.identities import affine_of_linear

QUICK = [
    "test_efficientnet",
    "test_resnet",
    "convnext_atto",
    "resnetv2_18",
    "starnet_s050",
    "test_byobnet",
    "test_coatnet",
    "mc3_18",
    "levit_128s",
    "resnest14d",
    "efficientvit_b0",
    "resnet18_fpn",
    "mobilenet_v3_small",
]


def row_of(name):
    (entry,) = (entry for entry in zoo() if entry.name == name)
    return examine(entry)


@pytest.mark.parametrize("name", QUICK)
def test_zoo(name):
    row = row_of(name)
    assert row.right, row
    assert row.folded + row.by_hand > 0


def test_a_norm_without_a_line_is_seen(monkeypatch):
    right = joint_pass.report_of

    def wrong(*args):
        found = right(*args)
        return dataclasses.replace(found, rewrites=found.rewrites[1:])

    monkeypatch.setattr(joint_pass, "report_of", wrong)
    assert not row_of("test_resnet").right


def test_a_wrong_gradient_is_seen(monkeypatch):
    right = affine_of_linear._sum
    monkeypatch.setattr(affine_of_linear, "_sum", lambda *args: right(*args) * (1 + 1e-6))
    assert not row_of("test_resnet").right

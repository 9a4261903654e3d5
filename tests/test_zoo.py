"""The quick models of the zoo, each with something of its own; `make zoo` runs all of them, the large ones too."""

import dataclasses

import pytest
from timm.models import levit
from torch import nn
from zoo import Entry, examine, zoo

from convbn_compile import joint_pass
from convbn_compile.identities import affine_of_linear

QUICK = [
    "test_efficientnet",
    "test_resnet",
    "convnext_atto",
    "test_byobnet",
    "test_coatnet",
    "resnet18_fpn",
]


def row_of(name):
    (entry,) = (entry for entry in zoo() if entry.name == name)
    return examine(entry)


@pytest.mark.parametrize("name", QUICK)
def test_zoo(name):
    assert_right(row_of(name))


def test_levit():
    """Its stages are blocks of linear layers with norms, and attention that makes an image smaller."""
    options = {"embed_dim": (32, 48), "num_heads": (2, 3), "depth": (1, 1), "key_dim": 16, "img_size": 64}
    assert_right(examine(Entry("timm", "levit", lambda: levit.LevitDistilled(num_classes=10, **options))))


def assert_right(row):
    assert row.right, row
    assert row.folded + row.by_hand > 0


def two_norms():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.BatchNorm2d(8))


TWO_NORMS = Entry("torch", "two norms", two_norms)


def test_two_norms():
    """They are right without the faults below."""
    assert_right(examine(TWO_NORMS))


def test_a_norm_without_a_line_is_seen(monkeypatch):
    right = joint_pass.report_of

    def wrong(*args):
        found = right(*args)
        return dataclasses.replace(found, rewrites=found.rewrites[1:])

    monkeypatch.setattr(joint_pass, "report_of", wrong)
    assert not examine(TWO_NORMS).right


def test_a_wrong_gradient_is_seen(monkeypatch):
    right = affine_of_linear._sum
    monkeypatch.setattr(affine_of_linear, "_sum", lambda *args: right(*args) * (1 + 1e-6))
    assert not examine(TWO_NORMS).right

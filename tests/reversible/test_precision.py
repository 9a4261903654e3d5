"""The rule of the gradient error against measured errors, and the anchors that follow from it."""

import pytest
import torch
from reversible.nets import chain_of
from torchvision.models import resnet

from convbn_compile.reversible import make_reversible, predicted_error
from convbn_compile.reversible.precision import growth, longest

MEASURED = [
    (1.0, 0.1, 3, 3e-6),
    (1.0, 0.1, 6, 4e-3),
    (1.0, 0.25, 6, 1e-4),
    (1.0, 0.5, 6, 1e-5),
    (0.75, 0.25, 6, 1e-5),
    (0.5, 0.5, 12, 3e-5),
    (0.3, 0.7, 12, 1e-6),
    (0.3, 0.7, 24, 8e-5),
    (0.25, 0.75, 24, 2e-5),
    (0.0, 1.0, 24, 3e-7),
]
"""alpha, beta, blocks, and the relative error of all gradients in float32 of a chain of pre-norm blocks."""


@pytest.mark.parametrize(("alpha", "beta", "blocks", "measured"), MEASURED)
@pytest.mark.filterwarnings("ignore:make_reversible.* predict a relative error")
def test_errors_of_chains(alpha, beta, blocks, measured):
    errors = []
    for seed in range(3):
        torch.manual_seed(seed)
        net = chain_of(blocks, width=32).float()
        handle = make_reversible(net, alpha, beta, chains=[""], anchor_every=None)
        errors.append(handle.gradient_error(torch.randn(16, 32)))
    error = sorted(errors)[1]
    assert measured / 2 <= error <= 2 * measured
    assert error <= max(predicted_error(alpha, beta, blocks), 5e-7) <= 10 * error


@pytest.mark.parametrize(("alpha", "beta", "largest"), [(1.0, 0.125, 1e-4), (0.3, 0.7, 5e-2)])
def test_errors_of_a_resnet(alpha, beta, largest):
    """At the end a sign flips now and then, which the rule does not predict."""
    torch.manual_seed(0)
    net = resnet.ResNet(resnet.Bottleneck, [1, 1, 12, 1], num_classes=5, width_per_group=16).train()
    handle = make_reversible(net, alpha, beta)
    assert 0 < handle.gradient_error(torch.randn(4, 3, 32, 32)) <= largest


def test_the_factor():
    assert growth(0.0, 1.0) == 1.0
    assert growth(0.3, 0.7) == pytest.approx(1 / 0.7)
    assert growth(1.0, 0.1) == pytest.approx(1.0916 / 0.0916, rel=1e-3)


def test_errors_saturate():
    assert predicted_error(1.0, 0.1, 1000) == 1.0
    assert predicted_error(1.0, 0.1, 0) == 0.0


def test_autocast_counts_but_for_one_block():
    assert predicted_error(1.0, 0.125, 1, low_precision=True) < 1e-7
    assert predicted_error(1.0, 0.125, 2, low_precision=True) > 1e-5
    assert predicted_error(1.0, 0.125, 2, low_precision=True, rectified=True) > 1e-3
    assert predicted_error(0.0, 1.0, 24, low_precision=True, rectified=True) > 1e-4
    assert longest(0.0, 1.0, low_precision=True, rectified=True) == 1


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.1), (0.1, 0.3), (0.0, 0.5)])
def test_streams_that_shrink(alpha, beta):
    """alpha + beta below 1: norms see ever smaller streams, and errors grow as if alpha were 1 - beta."""
    handle = make_reversible(chain_of(24, width=32).float(), alpha, beta, chains=[""])
    assert handle.gradient_error(torch.randn(16, 32)) <= 1e-4


def test_what_cannot_be_predicted():
    with pytest.raises(ValueError, match="beta must be above 0, for the inverse divides by it, got 0"):
        predicted_error(1.0, 0, 3)
    with pytest.raises(ValueError, match="blocks must be 0 or more, got -1"):
        predicted_error(1.0, 0.5, -1)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.125), (0.75, 0.25), (0.5, 0.5), (0.3, 0.7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_longest_run_is_within_the_tolerance_and_one_more_is_not(alpha, beta, dtype):
    most = longest(alpha, beta, dtype)
    assert predicted_error(alpha, beta, most, dtype) <= 1e-4 < predicted_error(alpha, beta, most + 1, dtype)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.125), (0.75, 0.25), (0.5, 0.5)])
def test_anchors_keep_deep_chains_exact(alpha, beta):
    """ "auto" holds the error of 24 blocks at the tolerance, where without anchors it is far above."""
    handle = make_reversible(chain_of(24, width=32).float(), alpha, beta, chains=[""])
    x = torch.randn(16, 32)
    assert handle.gradient_error(x) <= 1e-4
    handle.anchor_every = None
    with pytest.warns(UserWarning, match=f"24 F in a row at alpha = {alpha:g}, beta = {beta:g} in torch.float32"):
        assert handle.gradient_error(x) > 1e-3

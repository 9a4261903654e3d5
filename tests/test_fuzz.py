"""Some random networks from a fixed seed, and every counterexample that fuzzing found."""

import pytest
import torch
from fuzz import Affine, PerPixel, fuzz
from support import assert_as_eager, randomise
from torch import nn

from convbn_compile.identities import affine_of_linear

pytestmark = pytest.mark.filterwarnings("ignore:convbn_tune folded no batch norm")


def test_random_networks():
    assert fuzz(16, seed=0, progress=False) > 12


@pytest.mark.parametrize("name", ["fold", "_sum", "identity"])
def test_fuzzing_finds_a_wrong_fold(name, monkeypatch):
    right = getattr(affine_of_linear, name)

    def wrong(*args, **kwargs):
        found = right(*args, **kwargs)
        return (found[0] * 1.01, found[1]) if name == "fold" else found * 1.01

    monkeypatch.setattr(affine_of_linear, name, wrong)
    with pytest.raises(AssertionError):
        fuzz(60, seed=2, shrink=False, progress=False)


def test_a_number_is_all_that_is_added():
    """The shift was dropped if there was no bias and no step brought a tensor in."""
    scaled = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), Affine(4)).double()
    model = AddsOne(scaled)
    assert_as_eager(model, torch.randn(3, 4, 2, 2, dtype=torch.float64), folded=1, fold="always")


def test_a_computed_weight_is_not_saved_beside_the_output():
    """The output was saved as before, for the tanh after it, and the weight for the fold."""
    model = randomise(nn.Sequential(PerPixel(bias=False, low_rank=True), nn.BatchNorm1d(4), nn.Tanh()).double())
    assert_as_eager(model, torch.randn(2, 4, 3, dtype=torch.float64), folded=0)


class AddsOne(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.tanh(self.inner(x) * 0.5 + 1.0)

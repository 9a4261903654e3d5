"""Some random networks from a fixed seed, and every counterexample that fuzzing found."""

from fuzz import fuzz


def test_random_networks():
    assert fuzz(60, seed=0, progress=False) > 30

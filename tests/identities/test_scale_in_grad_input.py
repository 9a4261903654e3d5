"""The statement of scale_in_grad_input, in float64 on the grid, and mutants of it."""

import pytest
from identities.grid import IDS, SCALE_MUTANTS, SETTINGS, TOLERANCE, case, error

from convbn_compile.identities import scale_in_grad_input as identity


def difference(setting):
    c = case(setting)
    return error(
        identity.after(c.grad_output, c.scale, c.input, c.weight, c.conv),
        identity.before(c.grad_output, c.scale, c.input, c.weight, c.conv),
    )


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_statement(setting):
    assert difference(setting) <= TOLERANCE


@pytest.mark.parametrize(("mutant", "setting"), SCALE_MUTANTS)
def test_mutant_fails(mutant, setting, monkeypatch):
    monkeypatch.setattr(identity, "scale_output_channels", mutant)
    assert difference(setting) > 0.1

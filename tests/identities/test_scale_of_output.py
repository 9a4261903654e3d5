"""The statement of scale_of_output, in float64 on the grid, and mutants of it."""

import pytest
from identities.grid import IDS, SCALE_MUTANTS, SETTINGS, TOLERANCE, case, error

from convbn_compile.identities import scale_of_output as identity


def difference(setting):
    c = case(setting)
    return error(
        identity.after(c.scale, c.input, c.weight, c.conv), identity.before(c.scale, c.input, c.weight, c.conv)
    )


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_statement(setting):
    assert difference(setting) <= TOLERANCE


@pytest.mark.parametrize(("mutant", "setting"), SCALE_MUTANTS)
def test_mutant_fails(mutant, setting, monkeypatch):
    monkeypatch.setattr(identity, "scale_output_channels", mutant)
    assert difference(setting) > 0.1

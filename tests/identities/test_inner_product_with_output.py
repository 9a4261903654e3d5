"""The statement of inner_product_with_output, in float64 on the grid, and mutants of it."""

import pytest
from identities.grid import IDS, SETTINGS, SUM_MUTANTS, TOLERANCE, case, error

from convbn_compile.identities import inner_product_with_output as identity


def difference(setting):
    c = case(setting)
    return error(
        identity.after(c.grad_output, c.input, c.weight, c.conv),
        identity.before(c.grad_output, c.input, c.weight, c.conv),
    )


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_statement(setting):
    assert difference(setting) <= TOLERANCE


@pytest.mark.parametrize(("mutant", "setting"), SUM_MUTANTS)
def test_mutant_fails(mutant, setting, monkeypatch):
    monkeypatch.setattr(identity, "sum_over_output_channel", mutant)
    assert difference(setting) > 0.1

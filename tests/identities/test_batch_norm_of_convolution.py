"""The theorem: BN of a convolution and its five gradients, in float64 on the grid, against autograd; its mutants."""

import dataclasses
import itertools
from functools import partial

import pytest
import torch
from identities.grid import GROUPED_TRANSPOSED, IDS, PLAIN, SCALE_MUTANTS, SETTINGS, SUM_MUTANTS, TOLERANCE, case, error

from convbn_compile.identities import batch_norm_of_convolution as theorem
from convbn_compile.identities.batch_norm_of_convolution import Needs

EPS = 0.02


def difference(setting, *, bias=True, gamma=True, beta=True, mutate=lambda offset: offset):
    """Largest relative error of the output and of all gradients."""
    c = case(setting)
    generator = torch.Generator().manual_seed(2)
    random = partial(torch.randn, 8, generator=generator, dtype=torch.float64)
    tensors = {
        "input": c.input,
        "weight": c.weight,
        "bias": c.bias if bias else None,
        "gamma": random() if gamma else None,
        "beta": random() if beta else None,
    }
    mean, var = random(), random().abs() + 0.5
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items() if tensor is not None}
    output = theorem.before(**tensors, mean=mean, var=var, eps=EPS, conv=c.conv)
    wanted = torch.autograd.grad(output, tuple(leaves.values()), c.grad_output)

    needs = Needs(**{name: name in leaves for name in tensors})
    with torch.no_grad():
        folded, scale, invstd, offset = theorem.fold(
            c.weight, tensors["bias"], tensors["gamma"], mean, var, eps=EPS, conv=c.conv, dtype=torch.float64
        )
        offset = mutate(offset)
        found = theorem.forward(c.input, folded, tensors["beta"], scale, offset, conv=c.conv)
        gradients = theorem.backward(
            c.grad_output, c.input, c.weight, folded, scale, invstd, offset, conv=c.conv, needs=needs
        )
    for name, gradient in zip(tensors, gradients, strict=True):
        assert (gradient is not None) == (name in leaves)
    pairs = zip((gradient for gradient in gradients if gradient is not None), wanted, strict=True)
    return max(error(found, output), *(error(mine, autograd) for mine, autograd in pairs))


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_statement(setting):
    assert difference(setting) <= TOLERANCE * 10


@pytest.mark.parametrize(("bias", "gamma", "beta"), [*itertools.product((True, False), repeat=3)])
@pytest.mark.parametrize("setting", [PLAIN, GROUPED_TRANSPOSED])
def test_statement_without_some_parameters(setting, bias, gamma, beta):
    assert difference(setting, bias=bias, gamma=gamma, beta=beta) <= TOLERANCE * 10


@pytest.mark.parametrize(("mutant", "setting"), SCALE_MUTANTS)
def test_scale_mutant_fails(mutant, setting, monkeypatch):
    monkeypatch.setattr(theorem, "scale_output_channels", mutant)
    assert difference(setting) > 0.1


@pytest.mark.parametrize(("mutant", "setting"), SUM_MUTANTS)
def test_sum_mutant_fails(mutant, setting, monkeypatch):
    monkeypatch.setattr(theorem, "sum_over_output_channel", mutant)
    assert difference(setting) > 0.1


def test_mutant_without_bias_and_mean_fails():
    assert difference(PLAIN, mutate=torch.zeros_like) > 0.1


@pytest.mark.parametrize("wanted", [field.name for field in dataclasses.fields(Needs)])
def test_only_what_is_needed_is_computed(wanted):
    c = case(PLAIN)
    needs = Needs(**{field.name: field.name == wanted for field in dataclasses.fields(Needs)})
    ones = torch.ones(8, dtype=torch.float64)
    gradients = theorem.backward(c.grad_output, c.input, c.weight, c.weight, ones, ones, ones, conv=c.conv, needs=needs)
    present = [gradient is not None for gradient in gradients]
    assert present == [field.name == wanted for field in dataclasses.fields(Needs)]

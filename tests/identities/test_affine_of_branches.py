"""The theorem for several branches: scales and shifts of each and their sum, against autograd; its mutants."""

import pytest
import torch
from identities.grid import TOLERANCE, error
from identities.test_sum_of_branches import SUMS, random, weight_of

from convbn_compile._form import Form
from convbn_compile.identities import affine_of_linear as theorem
from convbn_compile.identities.affine_of_linear import Needs
from convbn_compile.identities.sum_of_branches import merge

CHANNELS = 4


def of_channel(value, rank):
    return value.reshape(-1, *[1] * rank) if isinstance(value, torch.Tensor) else value


def difference(branches, *, input_stays=False, mutate=lambda form: form):
    """Largest relative error of the output, of every gradient, and of the sums of two products."""
    merged = merge(branches)
    rank, count = len(merged.kernel), len(branches)
    x = random(2, CHANNELS, *(7, 6, 5)[:rank], seed=9).requires_grad_()
    weights = [weight_of(branch, CHANNELS, seed) for seed, branch in enumerate(branches)]
    biases = [None if weight is None else random(CHANNELS, seed=20 + k) for k, weight in enumerate(weights)]
    scales = [-0.5 if k == 1 else random(CHANNELS, seed=30 + k) for k in range(count)]
    shift, leaves = random(CHANNELS, seed=40), [t.requires_grad_() for t in (*weights, *biases) if t is not None]
    outputs = [
        x if weight is None else branch.params.forward(x, weight, bias)
        for branch, weight, bias in zip(branches, weights, biases, strict=True)
    ]
    output = sum(of_channel(s, rank) * y for s, y in zip(scales, outputs, strict=True)) + of_channel(shift, rank)
    grad = random(*output.shape, seed=41)
    wanted = torch.autograd.grad(output, [x, *leaves], grad)

    given = [0.0 if bias is None else bias for bias in biases]
    form = Form(tuple(scales), shift + sum(s * b for s, b in zip(scales, given, strict=True)))
    only = Form(tuple(float(k == count - 1) for k in range(count)), given[-1])
    products = [(form, 3.0), (only, random(CHANNELS, seed=42))]
    over = [0, *range(2, 2 + rank)]
    sums = [3 * (grad * output).sum(over), products[1][1] * (grad * outputs[-1]).sum(over)]
    with torch.no_grad():
        form, options = mutate(form), {"channels": CHANNELS, "dtype": torch.float64}
        (inside, itself) = form.without(weights.index(None)) if input_stays else (form, None)
        folded, total = theorem.fold(weights, inside, merged, **options)
        found = [theorem.forward(x, folded, total, merged, itself)]
        needs = Needs(True, *[tuple(t is not None for t in tensors) for tensors in (weights, biases)])
        weight, _ = theorem.fold(weights, Form(form.scales), merged, **options)
        grad_input, *rest, mine = theorem.backward(grad, x, weights, weight, form.scales, products, merged, needs=needs)
    found += [grad_input, *(t for tensors in rest for t in tensors if t is not None), *mine]
    return max(error(*pair) for pair in zip(found, [output, *wanted, *sums], strict=True))


@pytest.mark.parametrize("name", SUMS)
def test_statement(name):
    assert difference(SUMS[name]) <= TOLERANCE * 10


@pytest.mark.parametrize("name", ["repvgg", "mobileone", "1d", "3d"])
def test_the_input_may_stay_out_of_the_weight(name):
    assert difference(SUMS[name], input_stays=True) <= TOLERANCE * 10


def branches_exchanged(form):
    return Form(form.scales[::-1], form.shift)


def one_scale_for_all(form):
    return Form(form.scales[:1] * len(form.scales), form.shift)


@pytest.mark.parametrize("mutate", [branches_exchanged, one_scale_for_all])
def test_mutant_of_the_form_fails(mutate):
    assert difference(SUMS["repvgg"], mutate=mutate) > 0.1


def test_mutant_of_the_diagonal_fails(monkeypatch):
    monkeypatch.setattr(theorem, "diagonal", lambda weight, _merged: weight.flatten(1)[:, 0])
    assert difference(SUMS["repvgg"]) > 0.1

"""The theorem: an affine map of a linear operator and its gradients on the grid, against autograd; its mutants."""

import dataclasses
import itertools

import pytest
import torch
from identities.grid import GROUPED_TRANSPOSED, IDS, PLAIN, SCALE_MUTANTS, SETTINGS, SUM_MUTANTS, TOLERANCE, case, error

from convbn_compile._aten import MatmulParams
from convbn_compile._form import Form, Scale, Shift
from convbn_compile.identities import affine_of_linear as theorem
from convbn_compile.identities.affine_of_linear import Needs
from convbn_compile.identities.sum_of_branches import Merged


def random(*shape, seed=2):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_norm():
    """(y - mean) / std * gamma + beta, and after how many steps gamma's gradient reads it."""
    mean, std, gamma, beta = (random(8, seed=seed) for seed in range(4))
    return (Shift(mean, -1.0), Scale(std.abs() + 0.5, inverse=True), Scale(gamma), Shift(beta)), 2


def two_norms():
    first, _ = batch_norm()
    return (*first, Shift(random(8, seed=7), 0.5), Scale(random(8, seed=5)), Scale(-3.0)), 5


def scalars():
    return (Scale(2.0), Shift(random(1)), Scale(random(1, seed=3))), 2


def numbers():
    return (Scale(random(8)), Scale(0.5), Shift(2, 0.5)), 2


def no_scale():
    return (Shift(random(8)),), 1


def difference(input, weight, bias, conv, maps, *, mutate=lambda steps: steps):
    """Largest relative error of the output, the three gradients, and a product's sum."""
    steps, trained = maps()
    leaves = [tensor.requires_grad_() for tensor in (input, weight, bias) if tensor is not None]
    start, merged = Form((1.0,), 0.0 if bias is None else bias), Merged(conv, (), ((),))
    output = theorem.before([conv.forward(input, weight, bias)], Form((1.0,)).after(steps))
    grad_output = random(*output.shape, seed=9)
    wanted = torch.autograd.grad(output, leaves, grad_output)
    with torch.no_grad():
        halfway = theorem.before([conv.forward(input, weight, bias)], Form((1.0,)).after(steps[:trained]))
        product = (grad_output * 3.0 * halfway).sum([0, *range(2, output.dim())])
        steps = mutate(steps)
        folded, shift = theorem.fold([weight], start.after(steps), merged, channels=8, dtype=torch.float64)
        found = theorem.forward(input, folded, shift, merged)
        scale = Form((1.0,)).after(tuple(step for step in steps if isinstance(step, Scale)))
        backward_weight, _ = theorem.fold([weight], scale, merged, channels=8, dtype=torch.float64)
        grad_input, grad_weights, grad_biases, sums = theorem.backward(
            grad_output,
            input,
            [weight],
            backward_weight,
            scale.scales,
            [(start.after(steps[:trained]), 3.0)],
            merged,
            needs=Needs(True, (True,), (bias is not None,)),
        )
    gradients = [tensor for tensor in (grad_input, *grad_weights, *grad_biases) if tensor is not None]
    pairs = [*zip(gradients, wanted, strict=True), (sums[0], product)]
    return max(error(found, output), *(error(mine, autograd) for mine, autograd in pairs))


def convolution(setting, maps=batch_norm, *, bias=True, **mutant):
    c = case(setting)
    return difference(c.input, c.weight, c.bias if bias else None, c.conv, maps, **mutant)


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_statement(setting):
    assert convolution(setting) <= TOLERANCE * 10


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("maps", [batch_norm, two_norms, scalars, numbers, no_scale])
@pytest.mark.parametrize("setting", [PLAIN, GROUPED_TRANSPOSED])
def test_statement_for_other_maps(setting, maps, bias):
    assert convolution(setting, maps, bias=bias) <= TOLERANCE * 10


@pytest.mark.parametrize(("bias", "transposed"), [*itertools.product((True, False), repeat=2)])
@pytest.mark.parametrize("maps", [batch_norm, two_norms, scalars, numbers, no_scale])
def test_statement_of_a_linear_layer(maps, bias, transposed):
    weight = random(5, 8) if transposed else random(8, 5)
    assert (
        difference(random(6, 5), weight, random(8) if bias else None, MatmulParams(transposed), maps) <= TOLERANCE * 10
    )


@pytest.mark.parametrize(("mutant", "setting"), SCALE_MUTANTS)
def test_scale_mutant_fails(mutant, setting, monkeypatch):
    monkeypatch.setattr(theorem, "scale_output_channels", mutant)
    assert convolution(setting) > 0.1


@pytest.mark.parametrize(("mutant", "setting"), SUM_MUTANTS)
def test_sum_mutant_fails(mutant, setting, monkeypatch):
    monkeypatch.setattr(theorem, "sum_over_output_channel", mutant)
    assert convolution(setting) > 0.1


def divided_instead_of_multiplied(steps):
    return tuple(
        dataclasses.replace(step, inverse=not step.inverse) if isinstance(step, Scale) else step for step in steps
    )


def shifts_of_the_wrong_sign(steps):
    return tuple(dataclasses.replace(step, factor=-step.factor) if isinstance(step, Shift) else step for step in steps)


def in_reverse(steps):
    return steps[::-1]


@pytest.mark.parametrize("mutate", [divided_instead_of_multiplied, shifts_of_the_wrong_sign, in_reverse])
def test_mutant_of_the_steps_fails(mutate):
    assert convolution(PLAIN, mutate=mutate) > 0.1


@pytest.mark.parametrize("wanted", ["input", "weights", "biases", "product"])
def test_only_what_is_needed_is_computed(wanted):
    c = case(PLAIN)
    needs = Needs(wanted == "input", (wanted == "weights",), (wanted == "biases",))
    products = [(Form((1.0,)), 1.0)] if wanted == "product" else []
    grad_input, (grad_weight,), (grad_bias,), sums = theorem.backward(
        c.grad_output, c.input, [c.weight], c.weight, [1.0], products, Merged(c.conv, (), ((),)), needs=needs
    )
    found = {"input": grad_input, "weights": grad_weight, "biases": grad_bias}
    assert [name for name, tensor in found.items() if tensor is not None] == [name for name in found if name == wanted]
    assert len(sums) == len(products)

"""Linear forms of tensors: steps and sums come to what they do to the tensors themselves; mutants do not."""

import itertools

import pytest
import torch

from convbn_compile import _form
from convbn_compile._form import Form, Scale, Shift, over, total


def random(seed):
    return torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def done(step, tensor):
    """A step, as a network does it."""
    if isinstance(step, Shift):
        return tensor + step.factor * step.operand
    return tensor / step.operand if step.inverse else tensor * step.operand


STEPS = [Scale(random(0)), Scale(random(1), inverse=True), Shift(random(2)), Shift(random(3), -0.5)]
NUMBERS = [
    Scale(2.0),
    Scale(0.25, inverse=True),
    Scale(1),
    Scale(-1.0),
    Scale(0),
    Shift(3.0),
    Shift(0, 2.0),
    Shift(5, 0),
]
CHAINS = [*itertools.permutations(STEPS, 3), *itertools.product([*STEPS[:1], *STEPS[2:3]], NUMBERS, NUMBERS)]


def value(form, outputs):
    return sum(scale * y for scale, y in zip(form.scales, outputs, strict=True)) + form.shift


def difference(steps, *, numbers=(1.0, -2.0)):
    """Of the sum of two forms, then steps, and the same done to tensors."""
    outputs = [random(10), random(11)]
    first, second = Form((1.0, 0.0)), Form((random(12), random(13)), random(14))
    found = total([(first, numbers[0]), (second, numbers[1])]).after(steps)
    wanted = numbers[0] * value(first, outputs) + numbers[1] * value(second, outputs)
    for step in steps:
        wanted = done(step, wanted)
    return (value(found, outputs) - wanted).abs().max() / wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize("steps", CHAINS)
def test_steps(steps):
    assert difference(steps) <= 1e-13


@pytest.mark.parametrize("numbers", [*itertools.product((1.0, 0.0, -1.0, 3.0), repeat=2)])
def test_sums(numbers):
    assert difference((), numbers=numbers) <= 1e-13


def test_what_is_made_of_numbers_stays_a_number():
    form = Form((1.0, 0.0)).after((Scale(2.0), Shift(3.0), Scale(4.0, inverse=True)))
    assert form == Form((0.5, 0.0), 0.75)


def test_over_one_is_the_same_tensor():
    tensor = random(0)
    assert over(tensor, 1.0) is tensor
    assert torch.equal(over(tensor, random(1)), tensor / random(1))


@pytest.mark.parametrize(("name", "mutant"), [("times", lambda a, b: a + b), ("plus", lambda a, b: a - b)])
def test_mutant_fails(name, mutant, monkeypatch):
    monkeypatch.setattr(_form, name, mutant)
    assert max(map(difference, CHAINS)) > 0.1

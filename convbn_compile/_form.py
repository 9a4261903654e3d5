"""Linear forms of the outputs of branches, per channel: the steps that make them in a graph, and what they come to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

Value = Tensor | float


@dataclass(frozen=True)
class Scale:
    """Multiply by `operand`, or divide."""

    operand: Any
    inverse: bool = False


@dataclass(frozen=True)
class Shift:
    """Add `operand` times a number."""

    operand: Any
    factor: float = 1.0


Step = Scale | Shift
Steps = tuple[Step, ...]


@dataclass(frozen=True)
class Form:
    """sum over k of scales[k] . y_k + shift; a scale or shift is a tensor [C_out] or [1], or a number."""

    scales: tuple[Value, ...]
    shift: Value = 0.0

    def after(self, steps: Steps) -> Form:
        """The form after the steps; numbers as long as no step brings a tensor in."""
        scales, shift = list(self.scales), self.shift
        for step in steps:
            if isinstance(step, Shift):
                shift = plus(shift, times(step.operand, step.factor))
            else:
                operand = 1 / step.operand if step.inverse else step.operand
                scales, shift = [times(scale, operand) for scale in scales], times(shift, operand)
        return Form(tuple(scales), shift)

    def without(self, branch: int) -> tuple[Form, Value]:
        """The form with 0 for a branch, and that branch's scale."""
        scales = (*self.scales[:branch], 0.0, *self.scales[branch + 1 :])
        return Form(scales, self.shift), self.scales[branch]


def total(forms: Iterable[tuple[Form, float]]) -> Form:
    """The sum of forms, each times a number."""
    (first, factor), *rest = forms
    result = first.after((Scale(factor),))
    for form, number in rest:
        other = form.after((Scale(number),))
        scales = tuple(map(plus, result.scales, other.scales))
        result = Form(scales, plus(result.shift, other.shift))
    return result


def operands(*chains: Steps) -> list[Node]:
    """The nodes that the steps read, each once."""
    return list(dict.fromkeys(step.operand for steps in chains for step in steps if isinstance(step.operand, Node)))


def with_tensors(steps: Steps, tensors: Mapping[Node, Tensor], dtype: torch.dtype) -> Steps:
    """The steps with tensors [C_out] or [1] of one dtype in place of nodes."""

    def tensor(operand: Any) -> Any:
        return tensors[operand].reshape(-1).to(dtype) if isinstance(operand, Node) else operand

    return tuple(
        Scale(tensor(step.operand), step.inverse)
        if isinstance(step, Scale)
        else Shift(tensor(step.operand), step.factor)
        for step in steps
    )


def times(first: Value, second: Value) -> Value:
    """The product, without a node for a factor that is the number 1 or 0."""
    for one, other in ((first, second), (second, first)):
        if not isinstance(one, Tensor) and one in (0, 1):
            return other if one == 1 else 0.0
    return first * second


def plus(first: Value, second: Value) -> Value:
    """The sum, without a node for a term that is the number 0."""
    for one, other in ((first, second), (second, first)):
        if not isinstance(one, Tensor) and one == 0:
            return other
    return first + second


def is_zero(value: Value) -> bool:
    """True for the number 0."""
    return not isinstance(value, Tensor) and value == 0


def over(value: Any, divisor: Value) -> Any:
    """The quotient, without a node for a divisor that is the number 1."""
    return value if isinstance(divisor, float) and divisor == 1 else value / divisor

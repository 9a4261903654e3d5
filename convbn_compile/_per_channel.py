"""Follow a tensor through steps that keep its channels apart: scales and shifts per channel, casts, views."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from convbn_compile._aten import Gradients, aten, bind, convert_element_type, value
from convbn_compile._layout import REAPPLIED, Layout, after, before, same_sizes

# --- steps ---------------------------------------------------------------------------------------------------------


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
Value = Tensor | float


def operands(*chains: Steps) -> list[Node]:
    """The nodes that the steps read, each once."""
    return list(dict.fromkeys(step.operand for steps in chains for step in steps if isinstance(step.operand, Node)))


def with_tensors(steps: Steps, tensors: dict[Node, Tensor]) -> Steps:
    """The steps with tensors [C_out] or [1] in place of nodes."""

    def tensor(operand: Any) -> Any:
        return tensors[operand].reshape(-1) if isinstance(operand, Node) else operand

    return tuple(replace(step, operand=tensor(step.operand)) for step in steps)


def to_dtype(steps: Steps, dtype: torch.dtype) -> Steps:
    """The steps with their tensors in one dtype."""

    def cast(operand: Any) -> Any:
        return operand.to(dtype) if isinstance(operand, Tensor) else operand

    return tuple(replace(step, operand=cast(step.operand)) for step in steps)


def apply(steps: Steps, scale: Value, shift: Value) -> tuple[Value, Value]:
    """Scale and shift after the steps; numbers as long as no step brings a tensor in."""
    for step in steps:
        if isinstance(step, Shift):
            shift = plus(shift, times(step.operand, step.factor))
        else:
            operand = 1 / step.operand if step.inverse else step.operand
            scale, shift = times(scale, operand), times(shift, operand)
    return scale, shift


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


# --- downwards: from a node to its readers -------------------------------------------------------------------------


@dataclass(frozen=True)
class Affine:
    """A node that is scale . y + shift of the tensor that one started from, by the steps of all its parents."""

    node: Node
    layout: Layout
    steps: Steps = ()
    parent: Affine | None = None

    def ancestry(self) -> list[Affine]:
        """The way here, from the start, both ends included."""
        return [*(self.parent.ancestry() if self.parent else ()), self]

    def all_steps(self) -> Steps:
        """The steps from the start."""
        return tuple(step for affine in self.ancestry() for step in affine.steps)


def child(parent: Affine, node: Node, start: torch.dtype, gradients: Gradients) -> Affine | None:
    """What `node`, a reader of the parent, is if it takes one step further.

    Args:
        parent: where one is.
        node: a reader of it.
        start: the dtype that one started with; no step may narrow it.
        gradients: what a step cannot scale or shift by.
    """
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(node.meta.get("val"), Tensor):
        return None
    dtype = value(node).dtype
    if not dtype.is_floating_point or torch.promote_types(start, dtype) != dtype:
        return None
    if node.target in REAPPLIED:
        layout = after(parent.layout, node) if node.args[0] is parent.node else None
        return None if layout is None else Affine(node, layout, (), parent)
    if any(source in gradients for source in node.all_input_nodes if source is not parent.node):
        return None
    steps = _steps(node, parent)
    return None if steps is None else Affine(node, parent.layout, steps, parent)


def _steps(node: Node, parent: Affine) -> Steps | None:
    """The scales and shifts that an elementwise node does."""
    if node.target in (aten.neg.default, convert_element_type):
        return (Scale(-1.0),) if node.target is aten.neg.default else ()
    if node.target not in _ARITHMETIC:
        return None
    bound = bind(node)
    number = bound.pop("alpha", bound.pop("value", 1))
    others = [_unexpanded(operand) for operand in bound.values() if operand is not parent.node]
    if len(others) != len(bound) - 1 or not all(map(parent.layout.is_per_channel, others)):
        return None
    if isinstance(number, Node):
        return None
    return _arithmetic(node.target, others, number, list(bound.values()).index(parent.node))


def _unexpanded(operand: Any) -> Any:
    """What an operand is an expansion of, if it is one."""
    return operand.args[0] if isinstance(operand, Node) and operand.target is aten.expand.default else operand


def _arithmetic(target: Any, others: list[Any], number: float, place: int) -> Steps | None:
    """The steps of an operator with the parent in one place and `others` in the rest."""
    other, last = others[0], others[-1]
    if target in _ADDS or target in _SUBTRACTS:
        alpha = number if target in _ADDS else -number
        return (Shift(other, alpha),) if place == 0 else (Scale(alpha), Shift(other))
    if target in _MULTIPLIES:
        return (Scale(other),)
    if target in _DIVIDES and place == 0 and other != 0:
        return (Scale(other, inverse=True),)
    if target is aten.addcmul.default and place > 0:
        return Scale(last), Scale(number), Shift(other)
    if target is aten.addcdiv.default and place == 1:
        return Scale(last, inverse=True), Scale(number), Shift(other)
    return None


_ADDS = (aten.add.Tensor, aten.add.Scalar)
_SUBTRACTS = (aten.sub.Tensor, aten.sub.Scalar)
_MULTIPLIES = (aten.mul.Tensor, aten.mul.Scalar)
_DIVIDES = (aten.div.Tensor, aten.div.Scalar)
_ARITHMETIC = frozenset((*_ADDS, *_SUBTRACTS, *_MULTIPLIES, *_DIVIDES, aten.addcmul.default, aten.addcdiv.default))


# --- upwards: from a gradient to what it was made of ---------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """A node on the way up from a gradient, which is `scales` times it after the nodes `below`."""

    node: Node
    layout: Layout
    scales: Steps = ()
    below: tuple[Node, ...] = ()

    @property
    def moves(self) -> list[Node]:
        """The views, permutations and copies on the way down to the gradient."""
        return [node for node in self.below if node.target in REAPPLIED]


def upwards(gradient: Node, layout: Layout, gradients: Gradients) -> Iterator[Link]:
    """The gradient, and whatever it is a per-channel multiple of, nearest first."""
    link: Link | None = Link(gradient, layout)
    while link is not None:
        yield link
        link = _above(link, gradients)


def _above(link: Link, gradients: Gradients) -> Link | None:
    node = link.node
    found = _source(node, link.layout, gradients) if node.args else None
    if found is None or not isinstance(found[0], Node) or not isinstance(found[0].meta.get("val"), Tensor):
        return None
    source, scales = found
    layout = before(link.layout, node) if node.target in REAPPLIED else link.layout
    if layout is None or not same_sizes(value(source).shape, layout.sizes) or not value(source).is_floating_point():
        return None
    return Link(source, layout, (*scales, *link.scales), (node, *link.below))


def _source(node: Node, layout: Layout, gradients: Gradients) -> tuple[Any, Steps] | None:
    """What a node is a per-channel multiple of, and the multiple."""
    if sum(source in gradients for source in node.all_input_nodes) != 1:
        return None
    if node.target is convert_element_type or node.target in REAPPLIED:
        return node.args[0], ()
    if node.target is aten.neg.default:
        return node.args[0], (Scale(-1.0),)
    if node.target not in (*_MULTIPLIES, *_DIVIDES):
        return None
    first, second = node.args
    if isinstance(second, Node) and second in gradients:
        first, second = second, first
    factor, divides = _unexpanded(second), node.target in _DIVIDES
    if not layout.is_per_channel(factor) or (divides and (first is not node.args[0] or factor == 0)):
        return None
    return first, (Scale(factor, inverse=divides),)

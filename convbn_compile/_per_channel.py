"""Follow a tensor through steps that keep its channels apart: scales and shifts per channel, casts, views."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from convbn_compile._aten import Gradients, aten, convert_element_type, value
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
    number = node.kwargs.get("alpha", node.kwargs.get("value", 1))
    others = [argument for argument in node.args if argument is not parent.node]
    if len(others) != len(node.args) - 1 or not isinstance(number, (int, float)):
        return None
    if not all(map(parent.layout.is_per_channel, others)):
        return None
    is_first = node.args[0] is parent.node
    if node.target in _ADDS:
        return _add(others[0], number, is_first=is_first)
    if node.target in _SUBTRACTS:
        return _add(others[0], -number, is_first=is_first)
    if node.target in _MULTIPLIES:
        return (Scale(others[0]),)
    if node.target in _DIVIDES and is_first:
        return (Scale(others[0], inverse=True),)
    if node.target is aten.addcmul.default and not is_first:
        addend, factor = others
        return Scale(factor), Scale(number), Shift(addend)
    return None


def _add(other: Any, alpha: float, *, is_first: bool) -> Steps:
    """First + alpha * second, of which one is `other`."""
    return (Shift(other, alpha),) if is_first else (Scale(alpha), Shift(other))


_ADDS = (aten.add.Tensor, aten.add.Scalar)
_SUBTRACTS = (aten.sub.Tensor, aten.sub.Scalar)
_MULTIPLIES = (aten.mul.Tensor, aten.mul.Scalar)
_DIVIDES = (aten.div.Tensor, aten.div.Scalar)


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


def _is_fixed(operand: Any, gradients: Gradients) -> bool:
    return not isinstance(operand, Node) or operand not in gradients


def _source(node: Node, layout: Layout, gradients: Gradients) -> tuple[Any, Steps] | None:
    """What a node is a per-channel multiple of, and the multiple."""
    first, *rest = node.args
    if sum(source in gradients for source in node.all_input_nodes) != 1:
        return None
    if node.target is convert_element_type or node.target in REAPPLIED:
        return first, ()
    if node.target is aten.neg.default:
        return first, (Scale(-1.0),)
    if node.target is aten.mul.Tensor and _is_fixed(first, gradients) and layout.is_per_channel(first):
        return rest[0], (Scale(first),)
    if node.target in (*_MULTIPLIES, *_DIVIDES) and _is_fixed(rest[0], gradients) and layout.is_per_channel(rest[0]):
        return first, (Scale(rest[0], inverse=node.target in _DIVIDES),)
    return None

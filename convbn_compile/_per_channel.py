"""Follow a tensor through steps that keep its channels apart: scales and shifts per channel, casts, views."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from convbn_compile import _torch
from convbn_compile._aten import Gradients, aten, bind, convert_element_type, value
from convbn_compile._form import Form, Scale, Shift, Steps, total
from convbn_compile._layout import REAPPLIED, Layout, after, before, same_sizes

# --- downwards: from a node to its readers -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Affine:
    """A node that is an affine map of the tensors that one started from, per channel.

    Attributes:
        node: the node.
        layout: where its elements lie.
        parents: what it is made of: one, or two if it is their sum; none if it is a start.
        factors: a number for each of them.
        steps: what is done to that.
        starts: those of the starts that it is made of.
    """

    node: Node
    layout: Layout
    starts: frozenset[Node]
    parents: tuple[Affine, ...] = ()
    factors: tuple[float, ...] = (1.0,)
    steps: Steps = ()

    def ancestors(self) -> list[Affine]:
        """All that it is made of, itself included, each once."""
        found = {self.node: self}
        queue = [self]
        for affine in queue:
            new = [parent for parent in affine.parents if parent.node not in found]
            found.update((parent.node, parent) for parent in new)
            queue += new
        return queue

    def form(self, starts: Mapping[Node, Form], given: Callable[[Steps], Steps]) -> Form:
        """Its form of what the starts are forms of; `given` puts tensors in place of nodes."""
        forms = dict(starts)
        for affine in sorted(self.ancestors(), key=lambda affine: affine.node):
            if affine.parents:
                parents = [forms[parent.node] for parent in affine.parents]
                forms[affine.node] = total(zip(parents, affine.factors, strict=True)).after(given(affine.steps))
        return forms[self.node]


def start(node: Node) -> Affine:
    """Where one starts: channels along dim 1."""
    return Affine(node, Layout(value(node).shape, axis=1), frozenset((node,)))


def total_of(parents: tuple[Affine, Affine], node: Node, dtype: torch.dtype) -> Affine | None:
    """What `node`, a reader of both parents, is if it adds or subtracts them."""
    if node.target not in (*_ADDS, *_SUBTRACTS) or not _is_wide(node, dtype):
        return None
    bound = bind(node)
    first, second = (next(parent for parent in parents if parent.node is bound[name]) for name in ("self", "other"))
    alpha = bound["alpha"] if node.target in _ADDS else -bound["alpha"]
    if not first.layout.same_as(second.layout) or not isinstance(alpha, (int, float)):
        return None
    return Affine(node, first.layout, first.starts | second.starts, (first, second), (1.0, alpha))


def _is_wide(node: Node, dtype: torch.dtype) -> bool:
    """True if a node is a tensor of floating point that is as wide as `dtype`."""
    if not _torch.is_operator(node) or not isinstance(node.meta.get("val"), Tensor):
        return False
    own = value(node).dtype
    return own.is_floating_point and torch.promote_types(dtype, own) == own


def child(parent: Affine, node: Node, dtype: torch.dtype, gradients: Gradients) -> Affine | None:
    """What `node`, a reader of the parent, is if it takes one step further.

    Args:
        parent: where one is.
        node: a reader of it.
        dtype: what one started with; no step may narrow it.
        gradients: what a step cannot scale or shift by.
    """
    if not _is_wide(node, dtype):
        return None
    if node.target in REAPPLIED:
        layout = after(parent.layout, node) if node.args[0] is parent.node else None
        return None if layout is None else Affine(node, layout, parent.starts, (parent,))
    if any(source in gradients for source in node.all_input_nodes if source is not parent.node):
        return None
    steps = _steps(node, parent)
    return None if steps is None else Affine(node, parent.layout, parent.starts, (parent,), steps=steps)


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
    def head(self) -> Node:
        """The gradient."""
        return self.below[-1] if self.below else self.node

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

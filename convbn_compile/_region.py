"""What a graph makes of the output of a linear operator, per channel: how far that goes, and what backward reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Node

from convbn_compile import _torch
from convbn_compile._aten import Gradients, LinearOperator, aten, bind, convert_element_type, value
from convbn_compile._layout import Layout, same_sizes
from convbn_compile._per_channel import Affine, Scale, child


@dataclass(frozen=True)
class Product:
    """A node of backward that sums a gradient times an affine map of the output, over all but the channel."""

    total: Node
    affine: Affine
    gradient: Node


@dataclass(frozen=True)
class Region:
    """A linear operator and every node that is an affine map of its output, per channel.

    Attributes:
        output: the last one through which all that reads the output goes; None if nothing reads it.
        products: those whose affine map is not one of `output`.
        readers: the operators that read affine maps, besides these products.
        sizes: what reads the operator's output, or one on the way to `output`, for its sizes only.
    """

    op: LinearOperator
    affines: dict[Node, Affine]
    output: Affine | None
    products: tuple[Product, ...]
    readers: tuple[str, ...]
    sizes: tuple[Node, ...]

    @property
    def way(self) -> list[Affine]:
        """From the operator to the output, both ends included."""
        return [] if self.output is None else self.output.ancestry()

    @property
    def last_scale(self) -> Affine | None:
        """The last node on the way to the output that scales by a tensor."""
        return next(filter(_scales, reversed(self.way)), None)

    @property
    def scale(self) -> Affine | None:
        """The same; if there is none, one beside that way."""
        return self.last_scale or next(filter(_scales, self.affines.values()), None)


def _scales(affine: Affine) -> bool:
    return any(isinstance(step, Scale) and isinstance(step.operand, Node) for step in affine.steps)


def follow(op: LinearOperator, gradients: Gradients) -> Region:
    """What is made of the output of an operator, per channel."""
    start = value(op.node).dtype
    affines = {op.node: Affine(op.node, Layout(value(op.node).shape, axis=1))}
    products: list[Product] = []
    exits: list[tuple[Affine, Node]] = []
    queue = list(affines.values())
    sizes: list[tuple[Affine, Node]] = []
    for affine in queue:
        for user in affine.node.users:
            found = child(affine, user, start, gradients) if user not in affines else None
            if found is not None:
                affines[user] = found
                queue.append(found)
            elif user.target is aten.sym_size.int:
                sizes.append((affine, user))
            elif (sums := _products(affine, user, gradients)) is not None:
                products += sums
            else:
                exits.append((affine, user))
    output = _last_common([affine.ancestry() for affine, _ in exits])
    around = [(affine, user) for affine, user in sizes if not _is_on_the_way(affine, output)]
    if around:
        exits += around
        output = _last_common([affine.ancestry() for affine, _ in exits])
    before_output = tuple(product for product in products if output not in product.affine.ancestry())
    readers = tuple(user for _, user in sizes)
    return Region(op, affines, output, before_output, _names(user for _, user in exits), readers)


def _is_on_the_way(affine: Affine, output: Affine | None) -> bool:
    """True if a node is before `output`, or made of it."""
    return output is not None and (affine in output.ancestry() or output in affine.ancestry())


def _last_common(ways: list[list[Affine]]) -> Affine | None:
    last = None
    for level in zip(*ways, strict=False):
        if any(affine is not level[0] for affine in level):
            break
        last = level[0]
    return last


def _products(affine: Affine, node: Node, gradients: Gradients) -> list[Product] | None:
    """The sums that a product of the affine map with a gradient goes into; None if it is none, or goes elsewhere."""
    if node.target is not aten.mul.Tensor:
        return None
    first, second = node.args
    gradient = second if first is affine.node else first
    if not isinstance(gradient, Node) or gradient is affine.node or gradient not in gradients:
        return None
    if not same_sizes(value(gradient).shape, affine.layout.sizes):
        return None
    readers = list(node.users)
    for reader in readers:
        if reader.target is convert_element_type:
            readers += reader.users
    sums = [reader for reader in readers if reader.target is not convert_element_type]
    if not all(_sums_all_but(reader, affine.layout) for reader in sums):
        return None
    return [Product(reader, affine, gradient) for reader in sums]


def _sums_all_but(node: Node, layout: Layout) -> bool:
    """True if a node sums over every axis but the channels'; one of size 1 may be left out."""
    if node.target is not aten.sum.dim_IntList:
        return False
    summed = {dim % len(layout.sizes) for dim in bind(node)["dim"] or ()}
    left = layout.others - summed
    return bool(summed) and layout.axis not in summed and all(_torch.same_size(layout.sizes[dim], 1) for dim in left)


def _names(nodes: Iterable[Node]) -> tuple[str, ...]:
    """Operators, each once."""
    return tuple(dict.fromkeys(operator_name(node) for node in nodes))


def operator_name(node: Node) -> str:
    """The operator that computes a node, or where it comes from."""
    if node.op == "output":
        return "the caller"
    return "outside this graph" if node.op == "placeholder" else str(node.target).removesuffix(".default")

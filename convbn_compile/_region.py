"""What a graph makes of an input, and of the outputs of linear operators that read it, per channel."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch.fx import Node

from convbn_compile import _torch
from convbn_compile._aten import ConvParams, Gradients, LinearOperator, aten, bind, convert_element_type, value
from convbn_compile._form import Scale
from convbn_compile._layout import Layout, same_sizes
from convbn_compile._per_channel import Affine, child, start, total_of
from convbn_compile.report import NoMatch


@dataclass(frozen=True)
class Product:
    """A node of backward that sums a gradient times an affine map, over all but the channel."""

    total: Node
    affine: Affine
    gradient: Node


@dataclass(frozen=True)
class Span:
    """Every affine map of some starts, and what reads them.

    Attributes:
        affines: in the order of the graph.
        products: what sums gradients times them.
        exits: every other node that reads one.
        sizes: what reads one for its sizes only.
    """

    affines: dict[Node, Affine]
    products: tuple[Product, ...]
    exits: tuple[tuple[Affine, Node], ...]
    sizes: tuple[tuple[Affine, Node], ...]

    @property
    def readers(self) -> tuple[str, ...]:
        """The operators of the exits, each once."""
        return tuple(dict.fromkeys(operator_name(node) for _, node in self.exits))


@dataclass(frozen=True)
class Region:
    """Branches from one input to one output: linear operators, or the input itself, and affine maps of them.

    Attributes:
        branches: the operators; None is the input itself.
        output: that through which all goes that reads the operators' outputs.
        products: those whose affine map is not one of `output`.
        span: all affine maps, those that do not lead to the output included.
    """

    branches: tuple[LinearOperator | None, ...]
    output: Affine
    products: tuple[Product, ...]
    span: Span

    @property
    def operators(self) -> list[LinearOperator]:
        """The branches that are not the input itself."""
        return [branch for branch in self.branches if branch is not None]

    @property
    def first(self) -> LinearOperator:
        """The first of them."""
        return self.operators[0]

    @property
    def starts(self) -> list[Node]:
        """The branches' outputs."""
        return [self.first.input if branch is None else branch.node for branch in self.branches]

    @property
    def way(self) -> list[Affine]:
        """From an operator to the output, both ends included."""
        affine, way = self.output, [self.output]
        while affine.parents:
            affine = max(affine.parents, key=lambda parent: bool(parent.starts - {self.first.input}))
            way.append(affine)
        return way[::-1]


def scales(affine: Affine) -> bool:
    """True if a tensor is multiplied by."""
    return any(isinstance(step, Scale) and isinstance(step.operand, Node) for step in affine.steps)


def adds_up(affine: Affine) -> bool:
    """True if it is a sum of two."""
    return len(affine.parents) > 1


def last_scale(affines: Iterable[Affine]) -> Node | None:
    """The last node that scales by a tensor."""
    return max((affine.node for affine in affines if scales(affine)), default=None)


def follow(starts: Sequence[Node], gradients: Gradients) -> Span:
    """What is made of tensors with channels along dim 1."""
    dtype = value(starts[-1]).dtype
    affines = {node: start(node) for node in starts}
    products: list[Product] = []
    exits: list[tuple[Affine, Node]] = []
    sizes: list[tuple[Affine, Node]] = []
    queue = [user for node in starts for user in node.users]
    heapq.heapify(queue)
    seen = set(starts)
    while queue:
        node = heapq.heappop(queue)
        if node in seen:
            continue
        seen.add(node)
        parents = [affines[source] for source in node.all_input_nodes if source in affines]
        found = child(parents[0], node, dtype, gradients) if len(parents) == 1 else None
        if len(parents) == 2:
            found = total_of((parents[0], parents[1]), node, dtype)
        if found is not None:
            affines[node] = found
            for user in node.users:
                heapq.heappush(queue, user)
            continue
        sums = _products(parents[0], node, gradients) if len(parents) == 1 else None
        if sums is not None:
            products += sums
        else:
            readers = sizes if node.target is aten.sym_size.int else exits
            readers += [(parent, node) for parent in parents]
    return Span(affines, tuple(products), tuple(exits), tuple(sizes))


def parallel(op: LinearOperator) -> list[LinearOperator]:
    """The convolutions of forward that read the operator's input."""
    readers = [LinearOperator.of(user) for user in op.input.users if not _torch.is_backward(user)]
    return sorted(
        (other for other in readers if other and other.input is op.input and isinstance(other.params, ConvParams)),
        key=lambda other: other.node,
    )


def last_region(span: Span, op: LinearOperator) -> Region | None:
    """The region of one operator that goes as far as one can."""
    outputs = [affine for affine in reversed(span.affines.values()) if not _torch.is_backward(affine.node)]
    regions = (region(span, [op], output) for output in outputs)
    return next((found for found in regions if isinstance(found, Region)), None) if span.exits else None


def sums(span: Span, op: LinearOperator) -> Iterator[Affine]:
    """What is made of two branches or more, one of them an operator's; what goes furthest first.

    The input itself, added as it is to what one operator makes of it, is not worth a branch.
    """
    for output in reversed(span.affines.values()):
        nodes = output.starts - {op.input}
        by_itself = [affine for affine in output.ancestors() if not affine.starts & nodes]
        several = len(nodes) > 1 or (op.input in output.starts and any(map(scales, by_itself)))
        if op.node in nodes and several and not _torch.is_backward(output.node):
            yield output


def region(span: Span, operators: Sequence[LinearOperator], output: Affine) -> Region | NoMatch:
    """The region that ends in `output`, or what reads its operators' outputs past it."""
    by_node = {op.node: op for op in operators}
    inside = {affine.node for affine in output.ancestors()}
    past = _past(span, [node for node in output.starts if node in by_node], output)
    readers = (*span.exits, *(pair for pair in span.sizes if pair[0].node not in inside))
    names = dict.fromkeys(operator_name(node) for affine, node in readers if affine.node in past)
    if names:
        return NoMatch(f"what a {operators[0].name} gives is also read by {', '.join(names)}")
    starts = sorted(output.starts, key=lambda node: (node not in by_node, node))
    products = tuple(product for product in span.products if product.affine.node in past)
    return Region(tuple(by_node.get(node) for node in starts), output, products, span)


def _past(span: Span, starts: Iterable[Node], output: Affine) -> set[Node]:
    """The affine maps that are made of the starts, and not by way of the output."""
    found: set[Node] = set(starts) - {output.node}
    for node, affine in sorted(span.affines.items()):
        if node is not output.node and any(parent.node in found for parent in affine.parents):
            found.add(node)
    return found


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


OUTSIDE = "outside this graph"
"""Where the inputs of a graph come from."""


def operator_name(node: Node) -> str:
    """The operator that computes a node, or where it comes from."""
    if node.op == "output":
        return "the caller"
    return OUTSIDE if node.op == "placeholder" else str(node.target).removesuffix(".default")

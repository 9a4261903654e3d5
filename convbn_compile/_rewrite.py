"""Write the right sides of the theorem into a graph in place of the left ones."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from convbn_compile._aten import before_cast, value
from convbn_compile._fold_kernels import FOLDED
from convbn_compile._form import Form, Steps, Value, operands, over, plus, with_tensors
from convbn_compile._layout import REAPPLIED
from convbn_compile._match import Match, additions, is_addition
from convbn_compile._per_channel import Affine
from convbn_compile._splice import reapply, replace, splice
from convbn_compile.identities import affine_of_linear as theorem


def rewrite(found: Match, *, in_weight: bool = True) -> None:
    """Replace the left sides by the right sides in the graph; what is left of the old nodes is dead.

    Args:
        found: the match.
        in_weight: put the scales into the weight. If not, forward stays as it is, and in backward only what reads the
            output is replaced; for one branch.
    """
    if in_weight:
        _rewrite_forward(found)
    if found.gradient is not None:
        _rewrite_backward(found, in_weight=in_weight)


@dataclass(frozen=True)
class Bound:
    """The branches' tensors, and what a step reads, in the wide dtype."""

    weights: tuple[Tensor | None, ...]
    starts: dict[Node, Form]
    tensors: dict[Node, Tensor]
    dtype: torch.dtype

    @property
    def like(self) -> Tensor:
        """A tensor in the wide dtype, on the right device."""
        return next(weight for weight in self.weights if weight is not None)

    def steps(self, steps: Steps) -> Steps:
        """The steps with tensors in place of nodes."""
        return with_tensors(steps, self.tensors, self.dtype)

    def form(self, affine: Affine) -> Form:
        """What an affine map is of w_k (*) x."""
        return affine.form(self.starts, self.steps)

    def scale(self, chains: Iterable[Steps]) -> Value:
        """The sum of what each chain of scales comes to."""
        scales = [Form((1.0,)).after(self.steps(steps)).scales[0] for steps in chains]
        return reduce(plus, scales) if scales else 0.0


def _splice(
    function: Callable[..., Any], found: Match, chains: Sequence[Steps], *arguments: Node | None, **options: Any
) -> list[Node | None]:
    """Insert a function of what is bound of a match, and of the arguments."""
    branches, nodes = found.region.branches, operands(*chains)
    weights = [None if op is None else before_cast(op.weight) for op in branches]
    biases = [None if op is None or op.bias is None else before_cast(op.bias) for op in branches]
    read = [node for node in (*weights, *nodes) if node is not None]
    wide = reduce(torch.promote_types, (value(node).dtype for node in read), torch.float32)
    one = range(len(branches))

    def of_tensors(*tensors: Any) -> Any:
        given = iter(tensors)
        own = tuple(None if weight is None else weight.to(wide) for weight in islice(given, len(branches)))
        shifts = [0.0 if bias is None else bias.to(wide) for bias in islice(given, len(branches))]
        starts = {
            node: Form(tuple(float(index == other) for other in one), shifts[index])
            for index, node in enumerate(found.region.starts)
        }
        bound = Bound(own, starts, dict(zip(nodes, islice(given, len(nodes)), strict=True)), wide)
        return function(bound, *given)

    return splice(of_tensors, *weights, *biases, *nodes, *arguments, **options)


def _rewrite_forward(found: Match) -> None:
    region, output = found.region, found.region.output
    channels, dtype = value(region.first.node).shape[1], value(region.first.weight).dtype

    def fold(bound: Bound) -> Any:
        form, itself = bound.form(output), None
        if found.input_stays:
            form, itself = form.without(region.branches.index(None))
        folded = theorem.fold(bound.weights, form, found.merged, channels=channels, dtype=dtype)
        return *folded, None if itself is None else theorem.per_channel(itself, channels, bound.like)

    steps = [affine.steps for affine in output.ancestors()]
    terms = _splice(fold, found, steps, before=output.node, recompute=True)
    _mark(terms[0])

    def forward(input: Any, folded_weight: Any, shift: Any, itself: Any) -> Any:
        return theorem.forward(input, folded_weight, shift, found.merged, itself)

    (new,) = splice(forward, region.first.input, *terms, before=output.node)
    assert new is not None
    for affine in region.way:
        if affine.node.target in REAPPLIED:
            new = reapply(affine.node, new, before=output.node)
        for other, size in region.span.sizes:
            if other.layout.same_as(affine.layout) and other in output.ancestors():
                size.replace_input_with(other.node, new)
    replace(output.node, new)


def _rewrite_backward(found: Match, *, in_weight: bool) -> None:
    region, adjoints = found.region, [adjoint for adjoint in found.adjoints if adjoint is not None]
    place = max([adjoint.node for adjoint in adjoints] or [product.total for product in region.products])
    head = next((link for link in found.own if link is not None), None)
    gradient = found.gradient
    assert gradient is not None
    for move in head.moves if head is not None else ():
        gradient = reapply(move, gradient, before=place)
    scales = [_scales(found, branch) for branch in range(len(region.branches))]
    operator_weight = _operator_weight(found, scales, place) if in_weight else region.first.weight
    chains = [*(steps for alternatives in scales for steps in alternatives), *(link.scales for link in found.links)]
    chains += [affine.steps for product in found.products for affine in product.affine.ancestors()]

    def backward(bound: Bound, grad: Any, input: Any, folded: Any) -> Any:
        products = [
            (bound.form(product.affine), bound.scale([link.scales]))
            for product, link in zip(found.products, found.links, strict=True)
        ]
        own = [bound.scale(alternatives) for alternatives in scales]
        grad_input, grad_weights, grad_biases, sums = theorem.backward(
            grad,
            input,
            bound.weights,
            folded,
            own,
            products,
            found.merged,
            needs=found.needs,
            in_weight=in_weight,
        )
        for index, adjoint in enumerate(found.adjoints):
            grad_weight = grad_weights[index]
            if adjoint is not None and adjoint.weight_is_transposed and grad_weight is not None:
                grad_weights[index] = grad_weight.t()
        totals = [
            total.reshape(value(product.total).shape) for total, product in zip(sums, found.products, strict=True)
        ]
        return grad_input, *grad_weights, *grad_biases, *totals

    new = _splice(backward, found, chains, gradient, region.first.input, operator_weight, before=place)
    _replace_gradients(found, new)


def _scales(found: Match, branch: int) -> list[Steps]:
    """The chains of scales whose sum is c_k."""
    link = found.own[branch]
    if found.region.branches[branch] is None:
        return [copy.scales for copy, _ in found.copies]
    return [] if link is None else [link.scales]


def _operator_weight(found: Match, scales: Sequence[Sequence[Steps]], place: Node) -> Node:
    """What convolution_backward gets: merge(c_k . w_k), or, if only its shape is read, a weight of that shape."""
    region, kernel = found.region, found.merged.kernel
    given = [op.weight for op in region.operators if tuple(value(op.weight).shape[2:]) == kernel]
    unscaled = len(region.branches) == 1 and not any(scales[0])
    if given and (unscaled or not found.needs.input):
        return given[0]
    return _splice_weight(found, scales, before=place)


def _splice_weight(found: Match, scales: Sequence[Sequence[Steps]], *, before: Node) -> Node:
    """Insert merge(c_k . w_k), without what stays with g, to be computed again rather than saved.

    A branch that gives its input no gradient, as that of a detached one, has 0 in place of c_k.
    """
    channels, dtype = value(found.region.first.node).shape[1], value(found.region.first.weight).dtype

    def fold(bound: Bound) -> Tensor:
        own = [bound.scale(alternatives) for alternatives in scales]
        kept = theorem.stays(own, dtype)
        reached = [scale if reaches else 0.0 for scale, reaches in zip(own, found.reach_input, strict=True)]
        form = Form(tuple(over(scale, kept) for scale in reached))
        return theorem.fold(bound.weights, form, found.merged, channels=channels, dtype=dtype)[0]

    chains = [steps for alternatives in scales for steps in alternatives]
    (weight,) = _splice(fold, found, chains, before=before, recompute=True)
    return _mark(weight)


def _mark(weight: Node | None) -> Node:
    """Say of a folded weight that it is one."""
    assert weight is not None
    if weight.op == "call_function":
        weight.meta[FOLDED] = True
    return weight


def _replace_gradients(found: Match, new: Sequence[Node | None]) -> None:
    adjoints = found.adjoints
    old = [None if adjoint is None else adjoint.grad_weight for adjoint in adjoints]
    old += [None if adjoint is None else adjoint.grad_bias for adjoint in adjoints]
    old += [product.total for product in found.products]
    for old_node, new_node in zip(old, new[1:], strict=True):
        if old_node is not None:
            assert new_node is not None
            replace(old_node, new_node)
    inputs = [adjoint.grad_input for adjoint in adjoints if adjoint is not None and adjoint.grad_input is not None]
    if not inputs:
        return
    _drop([*((copy.head, addition) for copy, addition in found.copies), *map(_first_addition, inputs[1:])])
    assert new[0] is not None
    replace(inputs[0], new[0])


def _drop(terms: Iterable[tuple[Node, Node]]) -> None:
    """Leave each term out of its addition; if both terms of one go, leave that out of the next."""
    dropped: dict[Node, set[Node]] = defaultdict(set)
    queue = list(terms)
    for term, addition in queue:
        dropped[addition].add(term)
        if len(dropped[addition]) == len(addition.all_input_nodes):
            queue.append(_first_addition(addition))
    for addition in sorted(dropped):
        left = [term for term in addition.all_input_nodes if term not in dropped[addition]]
        if left:
            replace(addition, left[0])
    for addition in sorted(dropped, reverse=True):
        if not addition.users:
            addition.graph.erase_node(addition)


def _first_addition(term: Node) -> tuple[Node, Node]:
    """The first addition that a term goes into, after the term as it is there."""
    way = [term, *additions(term)]
    return next((before, node) for before, node in itertools.pairwise(way) if is_addition(node))

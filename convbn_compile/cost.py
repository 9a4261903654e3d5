"""What a rewrite would cost: the one place that decides against one that would be right, or between two that are."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.fx import Node

from convbn_compile import _torch
from convbn_compile._aten import Adjoint, LinearOperator, convert_element_type, value
from convbn_compile._match import Match

LARGEST_WEIGHT = 256
"""How many times as large as the output a weight may be, whose gradient is scaled so that the output is not saved."""

ELEMENTWISE = 10
"""How many multiplications of a convolution cost as much as an elementwise step on an entry of a tensor."""

_KEPT = "the {}'s weight is computed in the graph: backward, which does not read it, would keep it"


def belongs_in_weight(found: Match) -> bool:
    """True if the scale should go into the weight, rather than stay on the output and on the gradient.

    The larger one costs more to scale; what is saved for backward is the same either way. Where backward does not read
    the output, the weight is all that there is to fold into.
    """
    weight, output = _sizes(found)
    return weight <= output or not found.region.products


def objection(found: Match, *, trains: bool, once: bool = False) -> str | None:
    """Why this rewrite does not pay, or None; measured in docs/architecture.md.

    Args:
        found: the match.
        trains: the graph has a backward part.
        once: the weight is folded once for many calls, so that folding pays.
    """
    if once:
        return None
    op, saved = found.region.first, bool(found.region.products)
    weight, output = _sizes(found)
    if saved and not found.needs.weights[0]:
        return f"the {op.name}'s weight is frozen but the norm's is trained: folding would add a {op.name}"
    if not saved and weight > output:
        return (
            f"no output is saved for its scale, and the {op.name}'s weight, which would be scaled, is larger than that"
        )
    if saved and not found.needs.input and not _is_given(op.weight):
        return _KEPT.format(op.name)
    if trains and weight > LARGEST_WEIGHT * output:
        return f"the {op.name}'s weight is {weight // output} times as large as the output that would not be saved"
    return None


def merge_objection(found: Match, *, once: bool = False) -> str | None:
    """Why one convolution would do more work than several, or keep more; None if it pays.

    Args:
        found: the match.
        once: weights are added up once for many calls.

    Work is counted in multiplications. Forward and the input's gradient have each kernel's entries once, the weights'
    gradients those that are wanted; the branch that is the input itself is elementwise; so is adding weights up.
    """
    region, needs, op = found.region, found.needs, found.region.first
    if region.products and not needs.input and not all(_is_given(other.weight) for other in region.operators):
        return _KEPT.format(op.name)
    weight, output = _sizes(found)
    pairs, positions = weight // _entries(op), output // _torch.size_hint(value(op.node).shape[1])
    passes = 1 + needs.input + (any(needs.weights) or bool(region.products))
    several = sum(
        passes * ELEMENTWISE * output if op is None else _passes(adjoint) * _entries(op) * pairs * positions
        for op, adjoint in zip(region.branches, found.adjoints, strict=True)
    )
    entries = math.prod(found.merged.kernel)
    one = passes * entries * pairs * positions
    if one > several:
        return f"one kernel of {_by(found.merged.kernel)} would do more work"
    if not once and one + ELEMENTWISE * entries * pairs > several:
        return f"adding up the weights would be more work than what it saves at {positions} places of the output"
    return None


def _entries(op: LinearOperator) -> int:
    return math.prod(value(op.weight).shape[2:])


def _passes(adjoint: Adjoint | None) -> int:
    """Forward, and one for each of the two gradients that are wanted."""
    return 1 if adjoint is None else 1 + (adjoint.grad_input is not None) + (adjoint.grad_weight is not None)


def _by(kernel: Sequence[int]) -> str:
    return "x".join(map(str, kernel))


def _is_given(node: Node) -> bool:
    """True if a tensor is an input of the graph, or a view or cast of one."""
    while _torch.is_view(node) or node.target is convert_element_type:
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


def _sizes(found: Match) -> tuple[int, int]:
    """Elements of the weight and of the output."""
    op = found.region.first
    weight, output = (_torch.size_hint(value(node).numel()) for node in (op.weight, op.node))
    return weight, max(output, 1)

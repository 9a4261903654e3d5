"""What a rewrite would cost: the one place that decides against one that would be right, or between two that are."""

from __future__ import annotations

from convbn_compile import _torch
from convbn_compile._aten import value
from convbn_compile.identities.affine_of_linear import Match

LARGEST_WEIGHT = 128
"""How many times as large as the output a weight may be, whose gradient is scaled so that the output is not saved."""


def weight_is_smaller(found: Match) -> bool:
    """True if the scale should go into the weight: it has at most as many elements as the output.

    The larger one costs more to scale; what is saved for backward is the same either way.
    """
    weight, output = _sizes(found)
    return weight <= output


def objection(found: Match, *, trains: bool) -> str | None:
    """Why this rewrite does not pay, or None; measured in docs/architecture.md.

    Args:
        found: the match.
        trains: the graph has a backward part.
    """
    op, saved = found.region.op, bool(found.region.products)
    weight, output = _sizes(found)
    if saved and not found.needs.weight:
        return f"the {op.name}'s weight is frozen but the norm's is trained: folding would add a {op.name}"
    if trains and not saved and weight > output:
        return f"its scale is frozen, so that no output is saved for it, and the {op.name}'s weight is larger than that"
    if trains and weight > LARGEST_WEIGHT * output:
        return f"the {op.name}'s weight is {weight // output} times as large as the output that would not be saved"
    return None


def _sizes(found: Match) -> tuple[int, int]:
    """Elements of the weight and of the output."""
    op = found.region.op
    weight, output = (_torch.size_hint(value(node).numel()) for node in (op.weight, op.node))
    return weight, max(output, 1)

"""What a rewrite would cost: the one place that decides against one that would be right, or between two that are."""

from __future__ import annotations

from torch.fx import Node

from convbn_compile import _torch
from convbn_compile._aten import convert_element_type, value
from convbn_compile.identities.affine_of_linear import Match

LARGEST_WEIGHT = 128
"""How many times as large as the output a weight may be, whose gradient is scaled so that the output is not saved."""


def belongs_in_weight(found: Match) -> bool:
    """True if the scale should go into the weight, rather than stay on the output and on the gradient.

    The larger one costs more to scale; what is saved for backward is the same either way. Where backward does not read
    the output, the weight is all that there is to fold into.
    """
    weight, output = _sizes(found)
    return weight <= output or not found.region.products


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
    if not saved and weight > output:
        return (
            f"no output is saved for its scale, and the {op.name}'s weight, which would be scaled, is larger than that"
        )
    if saved and not found.needs.input and not _is_given(op.weight):
        return f"the {op.name}'s weight is computed in the graph: backward, which does not read it, would keep it"
    if trains and weight > LARGEST_WEIGHT * output:
        return f"the {op.name}'s weight is {weight // output} times as large as the output that would not be saved"
    return None


def _is_given(node: Node) -> bool:
    """True if a tensor is an input of the graph, or a view or cast of one."""
    while _torch.is_view(node) or node.target is convert_element_type:
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


def _sizes(found: Match) -> tuple[int, int]:
    """Elements of the weight and of the output."""
    op = found.region.op
    weight, output = (_torch.size_hint(value(node).numel()) for node in (op.weight, op.node))
    return weight, max(output, 1)

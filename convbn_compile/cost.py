"""What a fold would cost: the one place that decides against a rewrite that would be right."""

from __future__ import annotations

from convbn_compile.identities.affine_of_linear import Match


def objection(found: Match) -> str | None:
    """Why this fold does not pay, or None.

    Identity (4) makes the gradient of gamma from the gradient of the convolution's weight. Where nothing else
    needs that one, because the weight is frozen, folding would add a weight-gradient convolution to save one output.
    """
    name = found.region.op.name
    if found.region.products and not found.needs.weight:
        return f"the {name}'s weight is frozen but the norm's is trained: folding would add a {name}"
    return None

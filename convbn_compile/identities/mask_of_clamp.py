"""Take the gradient mask of a clamp (ReLU6, hardtanh) from its output instead of its input.

    z = clamp(x, a, b), a < b:      (x <= a) | (x >= b)  =  (z <= a) | (z >= b)               (6)

    x  input   any shape                 z  output  the same shape
    a, b  numbers

Legal because a clamp is the identity strictly between its bounds and maps the rest onto them.
Exact bit for bit, NaN included: it passes through the clamp, and compares false on both sides.
Where the next convolution keeps z, or a padded copy of it, neither x nor the mask need be saved.
If it keeps z rounded to a narrower dtype that has a and b, the mask is that of x rounded likewise, which is eager's: an
activation of that dtype is computed in a wide one, and rounding keeps the order of numbers.
Does not apply if: the bounds are tensors, or a >= b; or nothing keeps z, so that x or what it is made of may be dearer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from convbn_compile._aten import aten, kept_copies, value


def before(input: Tensor, lower: float, upper: float) -> Tensor:
    """(x <= a) | (x >= b)."""
    return (input <= lower) | (input >= upper)


def after(input: Tensor, lower: float, upper: float) -> Tensor:
    """(z <= a) | (z >= b)."""
    return before(input.clamp(lower, upper), lower, upper)


@dataclass(frozen=True)
class Match:
    """What is kept of a clamp's output, and the comparisons of its input with its bounds that come after the clamp."""

    output: Node
    comparisons: tuple[Node, ...]


def match(node: Node) -> Match | None:
    """The clamp that `node`, a clamp_max, closes; None if it is none or nothing compares its input."""
    inner = node.args[0] if node.target is aten.clamp_max.default else None
    if not isinstance(inner, Node) or inner.target is not aten.clamp_min.default:
        return None
    source, lower, upper = inner.args[0], inner.args[1], node.args[1]
    if not (isinstance(lower, (int, float)) and isinstance(upper, (int, float)) and lower < upper):
        return None
    assert isinstance(source, Node)
    if value(source).dtype != value(node).dtype:
        return None
    wanted = {(aten.le.Scalar, lower), (aten.ge.Scalar, upper)}
    # an in-place clamp saves a clone of its input for backward
    readers = [reader for same in (source, *_clones(source)) for reader in same.users]
    comparisons = [reader for reader in readers if reader.args[1:] and (reader.target, reader.args[1]) in wanted]
    kept = [copy for copy in kept_copies(node) if all(_has(value(copy).dtype, bound) for bound in (lower, upper))]
    later = tuple(comparison for comparison in comparisons if kept and kept[0] < comparison)
    return Match(kept[0], later) if later else None


def _has(dtype: torch.dtype, number: float) -> bool:
    """True if a dtype has a number."""
    return torch.tensor(number, dtype=torch.float64).to(dtype).item() == number


def _clones(node: Node) -> list[Node]:
    return [user for user in node.users if user.target is aten.clone.default]


def rewrite(found: Match) -> None:
    """Let the comparisons read the output."""
    for comparison in found.comparisons:
        comparison.update_arg(0, found.output)

"""Take what the gradient of leaky ReLU and ELU reads of their input from their output instead.

    z = x for x > 0, else a x                        a > 0                   (x > 0) = (z > 0)                  (10)
    z = p x for x > 0, else n (exp(c x) - 1)         p >= 1, n > 0, c > 0    (x > 0) = (z > 0),
                                                                             exp(c x) = z / n + 1 where x <= 0

    x  input   any shape                 z  output  the same shape
    a, p, n, c  numbers

Legal because both are increasing functions through 0; since p >= 1, no x > 0 underflows to 0.
The signs are exact bit for bit, NaN included. exp(c x) is exact in real arithmetic; in floating point it has the
absolute error of one rounding of z, where exp has a relative one: torch has the gradient of ELU(inplace=True) so.
Covers ELU, SELU and CELU, each in float32 and wider: an output in 16 bits is too coarse to find exp(c x) from.
Where the next convolution keeps z, neither x nor a mask need be saved.
Does not apply if: nothing keeps z; a, n or c is not positive, or p is below 1; or something else reads exp(c x).
Source: Rota Bulo et al., In-Place Activated BatchNorm, arXiv 1712.02616, section 3, which inverts both so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.fx import Node

from convbn_compile import _torch
from convbn_compile._aten import aten, kept_copies, value
from convbn_compile._splice import splice


def before(input: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """X > 0, and exp(c x)."""
    return input > 0, (input * scale).exp()


def after(output: Tensor, negative: float) -> tuple[Tensor, Tensor]:
    """Z > 0, and z / n + 1."""
    return output > 0, exponential(output, negative)


def exponential(output: Tensor, negative: float) -> Tensor:
    """Z / n + 1."""
    return output / negative + 1


@dataclass(frozen=True)
class Below:
    """What an activation is where x <= 0: a x, or, with an exponent c, n (exp(c x) - 1)."""

    factor: float
    exponent: float | None = None


@dataclass(frozen=True)
class Match:
    """What is kept of an activation's output, and what backward reads of its input: signs, and exponentials of it."""

    output: Node
    below: Below
    signs: tuple[Node, ...]
    exponentials: tuple[Node, ...]


def match(node: Node) -> Match | None:
    """The match that `node`, a where, gives; None if it is none."""
    condition = node.args[0] if node.target is aten.where.self and not _torch.is_backward(node) else None
    if not isinstance(condition, Node) or condition.target is not aten.gt.Scalar or not _is_sign(condition):
        return None
    source, above = condition.args[0], node.args[1]
    assert isinstance(source, Node)
    below, slope = _below(node.args[2], source), _multiple(above, source)
    if below is None or below.factor <= 0 or slope is None or slope < 1:
        return None
    return _kept(node, source, below)


def _kept(node: Node, source: Node, below: Below) -> Match | None:
    """The match of an activation, if its output is kept, and wide enough, and tells all that backward reads."""
    wide = 0 if below.exponent is None else 4
    kept = next((copy for copy in kept_copies(node) if value(copy).dtype.itemsize >= wide), None)
    readers = [reader for reader in source.users if kept is not None and kept < reader]
    signs = tuple(reader for reader in readers if _is_sign(reader))
    exponentials: tuple[Node, ...] = ()
    if below.exponent is not None:
        inner = [source, *(reader for reader in readers if _multiple(reader, source) is not None)]
        found = (user for argument in inner for user in argument.users if _torch.is_backward(user))
        exponentials = tuple(user for user in found if _is_exponential(user, source, below.exponent))
    if kept is None or not signs or (below.exponent is not None and not exponentials):
        return None
    return Match(kept, below, signs, exponentials)


def rewrite(found: Match) -> None:
    """Let backward read the output."""
    for sign in found.signs:
        sign.update_arg(0, found.output)
    for node in found.exponentials:
        (new,) = splice(partial(exponential, negative=found.below.factor), found.output, before=node)
        assert new is not None
        node.replace_all_uses_with(new)


def _multiple(node: Any, source: Any) -> float | None:
    """The number that a node is that many times the source; None if it is none."""
    if node is source:
        return 1.0
    if (
        not isinstance(node, Node)
        or node.target not in (aten.mul.Tensor, aten.div.Tensor)
        or node.args[0] is not source
    ):
        return None
    number = node.args[1]
    if not isinstance(number, (int, float)) or number == 0:
        return None
    return float(number) if node.target is aten.mul.Tensor else 1 / number


def _below(node: Any, source: Any) -> Below | None:
    """What an activation is where x <= 0."""
    slope = _multiple(node, source)
    if slope is not None:
        return Below(slope)
    inner = node if node.target is aten.expm1.default else node.args[0]
    factor = _multiple(node, inner) if isinstance(inner, Node) and inner.target is aten.expm1.default else None
    exponent = _multiple(inner.args[0], source) if factor is not None else None
    return None if factor is None or exponent is None or exponent <= 0 else Below(factor, exponent)


def _is_sign(node: Node) -> bool:
    """True for x > 0 and x <= 0."""
    return node.target in (aten.gt.Scalar, aten.le.Scalar) and not node.args[1]


def _is_exponential(node: Node, source: Node, exponent: float) -> bool:
    """True for exp(c x) of which only what is chosen where x <= 0 is read."""
    if node.target is not aten.exp.default:
        return False
    own = _multiple(node.args[0], source)
    if own is None or not math.isclose(own, exponent, rel_tol=1e-12):
        return False
    chosen = [(product, user) for product in node.users for user in product.users]
    return bool(chosen) and all(_chooses_below(user, product, source) for product, user in chosen)


def _chooses_below(node: Node, product: Node, source: Node) -> bool:
    """True for where(x <= 0, product, ...)."""
    if product.target is not aten.mul.Tensor or node.target is not aten.where.self:
        return False
    condition, chosen, other = node.args
    if not isinstance(condition, Node) or condition.target is not aten.le.Scalar or not _is_sign(condition):
        return False
    return condition.args[0] is source and chosen is product and other is not product

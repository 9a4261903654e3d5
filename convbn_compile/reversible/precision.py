"""How exact gradients are whose inputs were rebuilt by the inverse, and how many blocks may be rebuilt in a row.

    error = eps * (max(lambda+, 1) / |lambda-|) ** (blocks - 1),   at most 1                                  (rule)

    lambda+-   (alpha +- sqrt(alpha**2 + 4 beta)) / 2: the factors by which a block multiplies the streams where F is 0
    eps        half the spacing of numbers at 1 in the dtype that blocks compute in; of one block alone, in the streams
    error      of all parameters' gradients together, relative to ordinary autograd of the same network

The inverse divides by lambda-, so that rounding grows by a factor for each block that is rebuilt. Measured on chains of
pre-norm blocks the rule is two to six times too large; it holds while F's Jacobian is small against alpha. Behind
a ReLU errors jump where a sign flips, of which the rule does not know: anchors are set for a hundredth there.
Anchors, the streams kept every so many blocks, are this project's; the paper has none.
"""

from __future__ import annotations

import math

import torch

TOLERANCE = 1e-4
"""The predicted error that "auto" sets anchors for."""

JUMP = 100
"""By how much errors may jump where blocks end in an activation with a kink."""

LARGEST_ERROR = 1e-3
"""The predicted error above which there is a warning."""


def growth(alpha: float, beta: float) -> float:
    """By how much errors grow for each block that is rebuilt."""
    root = math.sqrt(alpha**2 + 4 * beta)
    return max((alpha + root) / 2, 1.0) / ((root - alpha) / 2)


def predicted_error(
    alpha: float, beta: float, blocks: int, dtype: torch.dtype = torch.float32, computed_in: torch.dtype | None = None
) -> float:
    """The relative error of gradients where so many blocks are rebuilt in a row, by the rule.

    Args:
        alpha: of the residual connections that the pretrained network has.
        beta: of the second ones, above 0.
        blocks: how many.
        dtype: of the streams.
        computed_in: of what is inside of the blocks, if it is another: autocast's.

    Examples:
        >>> predicted_error(1.0, 0.1, 3) < 1e-5 < predicted_error(1.0, 0.1, 4)
        True
    """
    if not blocks:
        return 0.0
    eps = _eps(dtype if blocks == 1 or computed_in is None else computed_in)
    return math.exp(min(math.log(eps) + (blocks - 1) * math.log(growth(alpha, beta)), 0.0))


def longest(
    alpha: float,
    beta: float,
    dtype: torch.dtype = torch.float32,
    computed_in: torch.dtype | None = None,
    tolerance: float = TOLERANCE,
) -> int | None:
    """How many blocks may be rebuilt in a row for an error of `tolerance`, 1 at least; None if any number may.

    Examples:
        >>> longest(1.0, 0.125), longest(0.3, 0.7), longest(0.0, 1.0)
        (4, 21, None)
        >>> longest(1.0, 0.125, computed_in=torch.bfloat16)
        1
    """
    room = math.log(tolerance / _eps(computed_in or dtype))
    if room < 0:
        return 1
    factor = growth(alpha, beta)
    return None if factor <= 1.0 else 1 + math.floor(room / math.log(factor))


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2

"""How exact gradients are whose inputs were rebuilt by the inverse, and how many blocks may be rebuilt in a row.

    error = eps * (lambda+ / |lambda-|) ** (blocks - 1),   at most 1                                           (rule)

    lambda+-   (a +- sqrt(a**2 + 4 beta)) / 2: the factors by which a block multiplies the streams where F is 0
    a          max(alpha, 1 - beta)
    eps        half the spacing of numbers at 1 in the streams' dtype
    error      of all parameters' gradients together, relative to ordinary autograd of the same network

The inverse divides by lambda-, so that rounding grows by a factor for each block that is rebuilt. Where alpha + beta is
below 1 the streams shrink with depth, and what norms do to errors grows as much: as if alpha were 1 - beta. Measured on
chains of pre-norm blocks the rule is up to ten times too large; it holds while F's Jacobian is small against alpha.
Where blocks end in a ReLU, errors jump as rounding flips a sign: by what eager's own rounding costs there, up to 1e-2
of a ResNet's gradients. Where they compute in 16 bits under autocast, they jump as a number is rounded the other way.
The rule is taken for JUMP times as much then, so that anchors are nearer to each other and signs flip seldom; it
predicts no flip. Where both are, no block's input is rebuilt.
Anchors, the streams kept every so many blocks, are this project's; the paper has none.
"""

from __future__ import annotations

import math

import torch

TOLERANCE = 1e-4
"""The predicted error that "auto" sets anchors for."""

JUMP = 100
"""By how much errors may jump at a kink or in 16 bits."""

LARGEST_ERROR = 1e-3
"""The predicted error above which there is a warning."""


def growth(alpha: float, beta: float) -> float:
    """By how much errors grow for each block that is rebuilt.

    Raises:
        ValueError: `beta` is not above 0, so that there is no inverse.
    """
    if not beta > 0:
        raise ValueError(f"beta must be above 0, for the inverse divides by it, got {beta!r}.")
    a = max(alpha, 1 - beta)
    root = math.sqrt(a**2 + 4 * beta)
    return (root + a) ** 2 / (4 * beta)


def predicted_error(
    alpha: float,
    beta: float,
    blocks: int,
    dtype: torch.dtype = torch.float32,
    *,
    rectified: bool = False,
    low_precision: bool = False,
) -> float:
    """The relative error of gradients where so many blocks are rebuilt in a row, by the rule.

    Args:
        alpha: of the pretrained residual connections.
        beta: of the second ones, above 0.
        blocks: how many, 0 or more.
        dtype: of the streams.
        rectified: the blocks end in an activation with a kink, such as ReLU.
        low_precision: they compute in 16 bits.

    Returns:
        ‖difference‖ / ‖gradient‖ over all parameters, at most 1.

    Raises:
        ValueError: `beta` is not above 0, or `blocks` below 0.

    Examples:
        >>> predicted_error(1.0, 0.1, 3) < 1e-5 < predicted_error(1.0, 0.1, 4)
        True
    """
    if blocks < 0:
        raise ValueError(f"blocks must be 0 or more, got {blocks!r}.")
    factor = growth(alpha, beta)
    if not blocks:
        return 0.0
    jumps = (rectified + low_precision) * math.log(JUMP) if blocks > 1 else 0.0
    return math.exp(min(math.log(torch.finfo(dtype).eps / 2) + (blocks - 1) * math.log(factor) + jumps, 0.0))


def longest(
    alpha: float,
    beta: float,
    dtype: torch.dtype = torch.float32,
    *,
    rectified: bool = False,
    low_precision: bool = False,
) -> int | None:
    """How many blocks may be rebuilt in a row for an error of TOLERANCE, 1 at least; None if any number may.

    Examples:
        >>> longest(1.0, 0.125), longest(0.3, 0.7), longest(0.0, 1.0)
        (4, 21, None)
        >>> longest(1.0, 0.125, rectified=True), longest(0.3, 0.7, rectified=True)
        (2, 8)
        >>> longest(0.3, 0.7, rectified=True, low_precision=True)
        1
    """
    factor = growth(alpha, beta)
    if rectified and low_precision:
        return 1
    if factor <= 1.0:
        return None
    tolerance = TOLERANCE / (JUMP if rectified or low_precision else 1)
    return 1 + max(0, math.floor(math.log(tolerance / (torch.finfo(dtype).eps / 2)) / math.log(factor)))

"""Checks of the coefficients and the anchors that a user gives."""

from __future__ import annotations

from typing import Any

from convbn_compile._arguments import shown
from convbn_compile.reversible._segment import Coefficients

AUTO = "auto"


def coefficients_of(alpha: Any, beta: Any) -> Coefficients:
    """Of two numbers, if they can be."""
    return Coefficients.of(amount("alpha", alpha), amount("beta", beta))


def amount(name: str, value: Any) -> float:
    """See to it that it is a finite number of at least 0.

    Raises:
        TypeError: it is no number.
        ValueError: it is below 0 or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {shown(value)}.")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}.")
    return float(value)


def check_anchors(every: Any) -> None:
    """See to it that it is a number of blocks, "auto" or None."""
    if every is None or every == AUTO:
        return
    if isinstance(every, bool) or not isinstance(every, int):
        raise TypeError(f'anchor_every must be a number of blocks, "auto" or None, got {every!r}.')
    if every < 1:
        raise ValueError(f"anchor_every must be at least 1, got {every}. None keeps no anchors.")

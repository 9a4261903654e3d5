"""CoefficientSchedule: alpha and beta on their way from the pretrained network to one whose gradients are exact."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from convbn_compile.reversible._checks import amount, coefficients_of
from convbn_compile.reversible.handle import Reversible

LINEAR, CONTROLLED = "linear", "controlled"
ERROR = 1e-7
"""The gradient error that is exact enough (the paper's Figure 3): a controlled schedule stops there."""

TOLERANCE = 0.05
"""By how much the loss may be above its lowest while a controlled schedule moves."""

SMOOTH = 0.9
"""Of the mean of losses, what is left of it in each step."""


class CoefficientSchedule:
    """Moves a reversible network's alpha and beta, in a straight line from where they are to `end`.

    Dr²Net's dynamic finetuning (arXiv 2401.04105, Figure 3). How the paper goes from start to end is not public: the
    line, its end on alpha + beta = 1, where streams do not grow with depth, and the share of steps are this project's.
    Call step() after each optimizer step, as of a learning rate scheduler: forward and backward need the same pair.

    "linear" is at the end after `until` of the steps. "controlled" goes there no faster, and waits while the mean of
    the losses is more than `tolerance` above its lowest, so that the network follows what changes under it. Without
    anchors it does not wait where the gradient error, measured on a batch that step() is given, is above `error` times
    100, which only moving on mends then. It stops where that error is below `error`.

    Args:
        handle: of make_reversible.
        total_steps: optimizer steps of the training.
        end: alpha and beta at the end.
        until: the share of the steps after which the end is reached.
        schedule: "linear" or "controlled".
        tolerance: of the loss, relative.
        error: of the gradients, relative.

    Raises:
        TypeError: `handle` is not one of make_reversible; a number is none.
        ValueError: a number out of range, or an unknown schedule.

    Examples:
        >>> from torch import nn
        >>> from convbn_compile.reversible import make_reversible
        >>> handle = make_reversible(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), chains=[""])
        >>> schedule = CoefficientSchedule(handle, total_steps=10)
        >>> for _ in range(4):
        ...     schedule.step()
        >>> handle.alpha, handle.beta
        (0.3, 0.7)
    """

    def __init__(
        self,
        handle: Reversible,
        total_steps: int,
        end: tuple[float, float] = (0.3, 0.7),
        until: float = 0.4,
        *,
        schedule: str = LINEAR,
        tolerance: float = TOLERANCE,
        error: float = ERROR,
    ) -> None:
        if not isinstance(handle, Reversible):
            raise TypeError(f"handle must be what make_reversible returns, got {handle!r} ({type(handle).__name__}).")
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps must be an int of at least 1, got {total_steps!r}.")
        for name, value in (("until", until), ("tolerance", tolerance), ("error", error)):
            amount(name, value)
        if not 0 < until <= 1:
            raise ValueError(f"until must be a share of the steps in (0, 1], got {until!r}.")
        if schedule not in (LINEAR, CONTROLLED):
            raise ValueError(f'schedule must be "linear" or "controlled", got {schedule!r}.')
        if not isinstance(end, (tuple, list)) or len(end) != 2:
            raise ValueError(f"end must be a pair (alpha, beta), got {end!r}.")
        if not coefficients_of(*end).beta:
            raise ValueError(f"end must have a beta above 0, got {end!r}.")
        self.handle, self.schedule, self.tolerance, self.error = handle, schedule, tolerance, error
        self.start, self.end = (handle.alpha, handle.beta), (float(end[0]), float(end[1]))
        self.moving_steps = max(1, round(total_steps * until))
        self.moved = 0
        self.arrived = False
        self.mean_loss: float | None = None
        self.lowest_loss = float("inf")

    def step(self, loss: float | Tensor | None = None, batch: Any = None) -> None:
        """After an optimizer step: the coefficients of the next one.

        Args:
            loss: of this step, which a controlled schedule needs.
            batch: a tensor, or a tuple of what the model is called with, to measure the gradient error with, in two
                steps' time: give it now and then. Without it a controlled schedule moves by the loss alone.

        Raises:
            ValueError: the schedule is controlled and there is no loss.
        """
        if self.schedule == CONTROLLED and not self._may_move(loss, batch):
            return
        self.moved = min(self.moved + 1, self.moving_steps)
        share = self.moved / self.moving_steps
        self.handle.set(*((1 - share) * first + share * last for first, last in zip(self.start, self.end, strict=True)))

    def _may_move(self, loss: float | Tensor | None, batch: Any) -> bool:
        if loss is None:
            raise ValueError('A schedule="controlled" needs the loss of each step: step(loss).')
        now = float(loss.detach() if isinstance(loss, Tensor) else loss)
        if not math.isfinite(now):  # a step that a gradient scaler skips
            return False
        self.mean_loss = now if self.mean_loss is None else SMOOTH * self.mean_loss + (1 - SMOOTH) * now
        self.lowest_loss = min(self.lowest_loss, self.mean_loss)
        if batch is not None and self.moved < self.moving_steps:
            error = self.handle.gradient_error(*(batch if isinstance(batch, tuple) else (batch,)))
            self.arrived = error <= self.error
            if error > 100 * self.error and self.handle.anchor_every is None:
                return True
        return not self.arrived and self.mean_loss <= self.lowest_loss + self.tolerance * abs(self.lowest_loss)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, alpha and beta among it."""
        names = ("start", "end", "moving_steps", "moved", "arrived", "mean_loss", "lowest_loss")
        return {name: getattr(self, name) for name in names} | {"alpha": self.handle.alpha, "beta": self.handle.beta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; the handle's coefficients are set.

        Args:
            state: of state_dict().

        Raises:
            ValueError: it is no schedule's.
        """
        expected = self.state_dict().keys()
        if state.keys() != expected:
            raise ValueError(f"The state of a CoefficientSchedule has {sorted(expected)}, got {sorted(state)}.")
        for name in expected - {"alpha", "beta"}:
            setattr(self, name, state[name])
        self.handle.set(state["alpha"], state["beta"])

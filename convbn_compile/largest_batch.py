"""largest_batch: how many images fit into a number of bytes, by estimates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from convbn_compile import _torch
from convbn_compile.estimate import estimate_memory

LARGEST = 2**32
"""Batch up to which bytes may stay the same."""


def largest_batch(
    model: nn.Module,
    example: Any,
    budget_bytes: int,
    *,
    mode: str = "tune",
    memory_budget: Any = 1.0,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> int:
    """The largest batch that a step of forward and backward fits into `budget_bytes` with, by `estimate_memory`.

    Bytes grow with the batch along a line, nearly, so that about four estimates find it, however large it is; some
    dozens where they jump. Two of them are of the batch, which fits, and of the next, which does not. What an estimate
    does not count, such as the state of an optimizer, is for the caller to take off the budget.

    Args:
        model: as in estimate_memory.
        example: one batch, of any size: a tensor, or a tuple of what the model is called with. The batch is dim 0 of
            its first tensor, and of every other one, in `kwargs` too, whose dim 0 is as large.
        budget_bytes: how many bytes the peak may have.
        mode: as in estimate_memory.
        memory_budget: likewise.
        options: likewise.
        kwargs: likewise.

    Raises:
        TypeError: `budget_bytes` is not an int, or as estimate_memory.
        ValueError: not even a batch of 1 fits; `example` does not begin with a tensor that has a batch; the bytes do
            not grow with the batch; or as estimate_memory.

    Examples:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU()).eval()
        >>> largest_batch(net, torch.empty(1, 3, 226, 226, device="meta"), 2**30)
        25
    """
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, Integral):
        raise TypeError(f"budget_bytes must be an int, got {budget_bytes!r} ({type(budget_bytes).__name__}).")
    inputs = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    batch = _batch(inputs)

    def bytes_at(size: int) -> int:
        args, named = _resized((inputs, kwargs), batch, size)
        estimate = estimate_memory(model, *args, mode=mode, memory_budget=memory_budget, options=options, **named)
        return estimate.peak_bytes

    return _search(bytes_at, batch, int(budget_bytes))


def _batch(inputs: tuple[Any, ...]) -> int:
    first = next(iter(_torch.tensors_in(inputs)), None)
    if first is None or not first.ndim or not first.shape[0]:
        got = "no tensor" if first is None else f"one of shape {tuple(first.shape)}"
        raise ValueError(f"example must begin with a tensor whose dim 0 is the batch, got {got}.")
    return int(first.shape[0])


def _resized(example: Any, batch: int, size: int) -> Any:
    """The example with fake tensors of another batch."""
    fake_mode = _torch.fake_mode_of(_torch.tensors_in(example))

    def resized(tensor: Tensor) -> Tensor:
        return _torch.fake_resized(tensor, size, fake_mode) if tensor.ndim and tensor.shape[0] == batch else tensor

    return _torch.map_tensors(resized, example)


def _search(bytes_at: Callable[[int], int], batch: int, budget: int) -> int:
    """The largest batch of at most `budget` bytes; `batch` is where to begin."""
    known: dict[int, int] = {}
    while True:
        known[batch] = bytes_at(batch)
        fits = max((size for size, number in known.items() if number <= budget), default=0)
        too_large = min((size for size, number in known.items() if number > budget), default=None)
        if too_large == 1:
            raise ValueError(
                f"No batch fits into budget_bytes={budget}: a batch of 1 takes {known[1]} bytes at the peak."
            )
        if too_large is not None and too_large - fits == 1:
            return fits
        batch = _next(known, fits, too_large, budget)


def _next(known: Mapping[int, int], fits: int, too_large: int | None, budget: int) -> int:
    """Where to look next: where the line through two batches meets the budget.

    In the middle, or at twice the size, if there is one batch only, and from time to time: it may not be a line. Where
    bytes do not grow, as those of weights' gradients, which may be the most in small batches, at 16 times the size.
    """
    if len(known) == 1 or (too_large is not None and len(known) > 5 and len(known) % 2):
        guess = 2 * fits if too_large is None else (fits + too_large) // 2
    else:
        low, high = _two(sorted(known), fits, too_large)
        growth = known[high] - known[low]
        if growth > 0:
            guess = low + (budget - known[low]) * (high - low) // growth
        elif too_large is None and high > LARGEST:
            raise ValueError(
                f"The bytes do not grow with the batch, dim 0 of the example: {known[min(known)]} for {min(known)}, "
                f"{known[high]} for {high}."
            )
        else:
            guess = 16 * high if too_large is None else 1
    guess = max(guess, fits + 1)
    return guess if too_large is None else min(guess, too_large - 1)


def _two(batches: Sequence[int], fits: int, too_large: int | None) -> Sequence[int]:
    """The two batches next to where the budget is met."""
    if too_large is None:
        return batches[-2:]
    return (fits, too_large) if fits else batches[:2]

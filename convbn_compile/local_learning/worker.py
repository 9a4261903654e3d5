"""The Worker: trains the units of one block, each by its own local loss, batch after batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from convbn_compile import _torch
from convbn_compile.local_learning._local import LocalUnit, Optimizer, optimizer_of, resident_bytes, seeded
from convbn_compile.local_learning._source import Source
from convbn_compile.measure import allocated_peak

WARM_UP = 0.1
"""The share of a block's steps in which learning rates rise."""

Advance = Callable[[int], Any]
"""Told how many batches are done."""


class Worker:
    """Of one block.

    Learning rates are those of the optimizer for a batch of `lr_batch_size`; those for another one go with the square
    root of the batch. They rise for the first steps of the block, and fall to 0 along half a cosine by its last.

    Args:
        units: of the block, on their device.
        optimizer: makes one for each unit.
        batch_size: of the block.
        lr_batch_size: the batch that the optimizer's learning rate is for.
        epochs: how many there will be.
    """

    def __init__(
        self, units: Sequence[LocalUnit], optimizer: Optimizer, batch_size: int, lr_batch_size: int, epochs: int
    ) -> None:
        self.units, self.batch_size, self.epochs = units, batch_size, epochs
        for unit in units:
            unit.zero_grad()  # of whatever was before
        self.optimizers = [optimizer_of(unit, optimizer) for unit in units]
        scale = math.sqrt(batch_size / lr_batch_size)
        self._lr = [[float(scale * group["lr"]) for group in each.param_groups] for each in self.optimizers]
        self.measured = 0

    @property
    def device(self) -> torch.device:
        """Where the units are."""
        return next(self.units[0].parameters()).device

    def epoch(self, source: Source, number: int, seed: Sequence[int], advance: Advance = lambda _: None) -> list[float]:
        """Train for an epoch.

        Args:
            source: of the block's input.
            number: of the epoch, from 0.
            seed: numbers; of the order of images, of dropout, and of what torch's generator augments.
            advance: for a progress bar.

        Returns:
            The mean loss of each unit.
        """
        losses = torch.zeros(len(self.units))
        with seeded(self.device, *seed), _torch.unlimited_compiles():
            order = shuffled(len(source), self.batch_size)
            for unit in self.units:
                unit.train()
            batches = source.batches(order)
            for step in range(len(order)):
                self._set_lr((number * len(order) + step + 0.5) / (self.epochs * len(order)))
                measures = number == 0 and step == min(1, len(order) - 1)  # the first step compiles
                losses += self._measured(source, batches) if measures else self._batch(*next(batches))
                advance(1)
        return [float(loss) for loss in losses / len(order)]

    def _batch(self, x: Tensor, target: Tensor) -> Tensor:
        """One step of each unit."""
        value, expected = x.to(self.device), target.to(self.device)
        losses = []
        for unit, optimizer in zip(self.units, self.optimizers, strict=True):
            value, loss = unit.step(value, expected, optimizer)
            losses.append(loss)
        return torch.stack(losses).cpu()

    def _measured(self, source: Source, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """The same with the next batch; finds out what it takes at the peak, if computing its input is part of it."""
        pairs = zip(self.units, self.optimizers, strict=True)
        resident = source.resident + sum(resident_bytes(unit, optimizer) for unit, optimizer in pairs)
        held: list[tuple[Tensor, Tensor]] = []
        fetched = allocated_peak(lambda: held.append(next(batches)), self.device)
        losses: list[Tensor] = []
        there = sum(tensor.nbytes for tensor in held[0] if tensor.device == self.device)
        rise = allocated_peak(lambda: losses.append(self._batch(*held[0])), self.device)
        self.measured = resident + max(there + rise, fetched if source.resident else 0)
        return losses[0]

    def _set_lr(self, progress: float) -> None:
        share = min(1.0, progress / WARM_UP) * (1.0 + math.cos(math.pi * progress)) / 2.0
        for optimizer, rates in zip(self.optimizers, self._lr, strict=True):
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * share

    @torch.no_grad()
    def accuracies(self, source: Source) -> list[float]:
        """The share of images that each exit of the block gets right."""
        right = torch.zeros(len(self.units), dtype=torch.int64)
        for unit in self.units:
            unit.eval()
        for x, target in source.batches(in_order(len(source), self.batch_size)):
            value, expected = x.to(self.device), target.to(self.device)
            for index, unit in enumerate(self.units):
                value = unit.unit(value)
                right[index] += (unit.head(value).argmax(1) == expected).sum().cpu()
        return (right / len(source)).tolist()

    def state(self) -> dict[str, Any]:
        """What a killed run goes on from."""
        return {
            "units": [unit.state_dict() for unit in self.units],
            "optimizers": [_plain(optimizer.state_dict()) for optimizer in self.optimizers],
            "measured": self.measured,
        }

    def load(self, state: dict[str, Any]) -> None:
        """What state returned."""
        for unit, values in zip(self.units, state["units"], strict=True):
            unit.load_state_dict(values)
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.measured = state["measured"]


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with the numbers of its groups as Python's, which are read as data, unlike NumPy's."""
    groups = [{key: _number(value) for key, value in group.items()} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and not isinstance(value, Tensor) else value


def shuffled(number: int, batch_size: int) -> list[Tensor]:
    """The numbers of an epoch's images in random order, batch by batch, without an incomplete last one."""
    whole = number - number % batch_size
    return list(torch.split(torch.randperm(number)[:whole], batch_size))


def in_order(number: int, batch_size: int) -> list[Tensor]:
    """All numbers of images in order, batch by batch."""
    return list(torch.split(torch.arange(number), batch_size))

"""One setting of a benchmark: each contender on its own, then all of them in turn, step by step."""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convbn_compile import _torch
from convbn_compile._setting import Setting
from convbn_compile.benchmark import Row
from convbn_compile.contenders import Contender
from convbn_compile.measure import Step, held
from convbn_compile.models import brief

WARMUPS = 2
"""Rounds before those that are timed."""


@dataclass(frozen=True)
class Contest:
    """What all contenders of a setting have in common.

    Attributes:
        setting: the batch size, resolution and dtype.
        model: to copy.
        args: what it is called with, for the shapes.
        kwargs: likewise.
        prime: compile caches with what all graphs share, such as precompiled headers, and no graph.
        caches: a folder for the compile caches of each.
        tell: called with what is done next, for each contender twice and for each round once.
    """

    setting: Setting
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    prime: Path
    caches: Path
    tell: Callable[[str], None]

    def rows(self, contenders: Sequence[Contender], *, steps: int, reference: str) -> list[Row]:
        """Measure them: a row for each."""
        entrants = [Entrant(self, contender) for contender in contenders]
        for entrant in entrants:
            self.tell(f"{entrant.contender.label}: cold")
            entrant.attempt(entrant.alone)
        torch.compiler.reset()
        for entrant in entrants:
            self.tell(f"{entrant.contender.label}: warm")
            entrant.attempt(entrant.warm)
        for number in range(WARMUPS + steps):
            self.tell("steps")
            for entrant in rotated(entrants, number):
                entrant.attempt(entrant.time)
        seconds = next(entrant.seconds for entrant in entrants if entrant.contender.name == reference)
        return [entrant.result(seconds) for entrant in entrants]


def rotated(entrants: Sequence[Entrant], number: int) -> list[Entrant]:
    """Another one first in every round: none always follows the same."""
    first = number % len(entrants)
    return [*entrants[first:], *entrants[:first]]


class Entrant:
    """A contender in a contest: its row so far, its step while it has one, and the seconds of all rounds."""

    def __init__(self, contest: Contest, contender: Contender) -> None:
        self.contest, self.contender = contest, contender
        contest.caches.mkdir(parents=True, exist_ok=True)
        self.caches = Path(tempfile.mkdtemp(dir=contest.caches)) / "caches"
        batch, size = contest.setting.measures((contest.args, contest.kwargs))
        self.row = self.blank = Row(contender.name, contender.label, batch, size, contest.setting.dtype)
        self.step: Step | None = None
        self.seconds: list[float] = []

    def attempt(self, action: Callable[[], None]) -> None:
        """Do it, unless something failed before; a failure is the reason in the row, and costs no other its rows."""
        if self.row.because:
            return
        try:
            action()
        except (Exception, SystemExit) as error:  # noqa: BLE001  whatever it is: this one could not run
            self.row = replace(self.blank, because=" ".join(brief(error).split()))
            self.step = None
            self.seconds.clear()

    def alone(self) -> None:
        """Compile cold; measure memory and count, while no other is in memory."""
        torch.compiler.reset()
        before = held(self._device())
        shutil.copytree(self.contest.prime, self.caches)
        first, kernels = _torch.generated_kernels(self._first_step)
        later = min(self._timed(), self._timed())
        compiles = self.contender.compile is not None
        peak = self._step().peak(before)
        self.row = replace(
            self.row,
            cold_seconds=max(0.0, first - later) if compiles else None,
            kernels=kernels or None,
            saved_bytes=self._step().saved_bytes(),
            peak_bytes=peak.bytes,
            reserved_bytes=peak.reserved,
            convolutions=self._step().convolutions(),
        )
        self.step = None

    def warm(self) -> None:
        """Compile from the caches on disk; what is compiled stays."""
        first = self._first_step()
        if self.contender.compile is not None:
            self.row = replace(self.row, warm_seconds=first)

    def time(self) -> None:
        """One step."""
        self.seconds.append(self._timed())

    def result(self, reference: Sequence[float]) -> Row:
        """The row, with the steps and their ratio to those of the reference."""
        seconds = tuple(self.seconds[WARMUPS:])
        row = replace(self.row, seconds=seconds)
        if row.median is not None and row.warm_seconds is not None:
            row = replace(row, warm_seconds=max(0.0, row.warm_seconds - row.median))
        pairs = list(zip(seconds, reference[WARMUPS:], strict=False))
        if not pairs or not self.contender.backward:
            return row
        return replace(row, ratio=statistics.median(mine / theirs for mine, theirs in pairs))

    def _first_step(self) -> float:
        """Build the network, compile it and run a step."""
        contest, contender = self.contest, self.contender
        with _torch.compile_caches_in(self.caches):
            network = contender.build(contest.setting.model(contest.model))
            function = network if contender.compile is None else contender.compile(network)
            args, kwargs = contest.setting.inputs((contest.args, contest.kwargs))
            self.step = Step(function, network, args, kwargs, contest.setting.autocast, contender.backward)
            return self._timed()

    def _step(self) -> Step:
        assert self.step is not None, "there is a step once the network is built"
        return self.step

    def _timed(self) -> float:
        return self._step().seconds()

    def _device(self) -> torch.device:
        return _torch.tensors_in((self.contest.args, self.contest.kwargs))[0].device

"""The Profiler: what a step of each unit takes, by batch size, as a line.

    m_l(b) = p_l + q_l b                          least squares over batch sizes 2, 4, 8 and the largest that may fit

m_l is the peak of a real step of unit l with its head, its loss, gradients and optimizer: bytes that are resident
(parameters, buffers, the optimizer's state, the batch) and what the step allocates beyond them at its peak, which on
CUDA is told by the allocator (max_memory_allocated), and elsewhere counted from the allocator's events. Either has what
a convolution needs inside of itself, which for the weights of late layers is more than what is saved for backward.
Source: the linear model of memory of NeuroFlux (arXiv 2402.14139).
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn

from convbn_compile._extras import require
from convbn_compile.estimate import MIB
from convbn_compile.local_learning._local import LocalUnit, Optimizer, resident_bytes
from convbn_compile.measure import allocated_peak

BATCH_SIZES = (2, 4, 8)
LINEAR = 0.99
"""The least R² of a line."""


@dataclass(frozen=True)
class UnitProfile:
    """What a step of one unit takes.

    Attributes:
        name: of the unit.
        shape: of its output for one image.
        input_bytes: of its input for one image.
        parameters: how many it and its head have.
        resident: bytes of parameters, buffers and the optimizer's state.
        points: batch sizes, and bytes.
        intercept: p_l, bytes.
        slope: q_l, bytes for each image.
        r2: R² of the line.
        margin: bytes by which the line was raised, so that no point is above it; 0 where it fits.
    """

    name: str
    shape: tuple[int, ...]
    input_bytes: int
    parameters: int
    resident: int
    points: tuple[tuple[int, int], ...]
    intercept: float = 0.0
    slope: float = 0.0
    r2: float = 1.0
    margin: float = 0.0

    @property
    def linear(self) -> bool:
        """Whether the line fits."""
        return self.r2 >= LINEAR

    @property
    def passing(self) -> float:
        """p_l without what is resident: bytes that are there during the unit's own step only."""
        return self.intercept + self.margin - self.resident

    def at(self, batch: int) -> float:
        """Bytes by the line."""
        return self.intercept + self.margin + self.slope * batch

    def largest(self, budget: float) -> float:
        """The batch that fills so many bytes; infinite if no batch does."""
        return (budget - self.at(0)) / self.slope if self.slope else math.inf


@dataclass(frozen=True)
class Profile:
    """What a step of each unit takes."""

    units: tuple[UnitProfile, ...]

    def __str__(self) -> str:
        rows = [
            [
                unit.name,
                "x".join(map(str, unit.shape)),
                f"{unit.parameters:,}",
                f"{unit.at(0) / MIB:.2f}",
                f"{unit.slope / MIB:.4f}",
                f"{unit.r2:.6f}",
                ", ".join(str(batch) for batch, _ in unit.points),
                _remark(unit),
            ]
            for unit in self.units
        ]
        headers = ("unit", "output", "parameters", "p MiB", "q MiB/image", "R²", "batches", "")
        right = ("left", "left", *["right"] * 4, "left", "left")
        return tabulate(rows, headers=headers, disable_numparse=True, colalign=right)

    def plot(self, path: str | Path) -> None:
        """Write a plot of bytes against batch size, points and lines.

        Args:
            path: of the file, in a format that matplotlib writes.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        figure = require("matplotlib.figure", extra="local-learning").Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for unit in self.units:
            batches = [batch for batch, _ in unit.points]
            points = axes.scatter(batches, [size / MIB for _, size in unit.points], s=12)
            color = points.get_facecolor()[0]
            axes.plot(batches, [unit.at(batch) / MIB for batch in batches], color=color, label=unit.name)
        axes.set(xlabel="batch size", ylabel="MiB at the peak of a step", xscale="log", yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(path, dpi=150)


def _remark(unit: UnitProfile) -> str:
    added = f"{unit.margin / MIB:.2f} MiB added" if unit.margin else ""
    return added if unit.linear else f"not linear: {added}"


def fitted(profile: UnitProfile) -> UnitProfile:
    """The line through the points of a profile, and how well it fits."""
    batches, sizes = [[float(each) for each in side] for side in zip(*profile.points, strict=True)]
    slope, intercept = statistics.linear_regression(batches, sizes)
    errors = [size - (intercept + slope * batch) for batch, size in zip(batches, sizes, strict=True)]
    spread = sum((size - statistics.fmean(sizes)) ** 2 for size in sizes)
    r2 = 1.0 - sum(error**2 for error in errors) / spread if spread else 1.0
    margin = 0.0 if r2 >= LINEAR and slope >= 0.0 else max(errors)
    return replace(profile, intercept=intercept, slope=max(slope, 0.0), r2=r2, margin=margin)


def checked(profile: UnitProfile, batch: int, size: int) -> UnitProfile:
    """With one point more, above which the line is raised if it is below."""
    margin = profile.margin + max(0.0, size - profile.at(batch))
    return replace(profile, points=tuple(sorted([*profile.points, (batch, size)])), margin=margin)


@contextmanager
def steps_of(
    local: LocalUnit, shape: Sequence[int], optimizer: Optimizer, device: torch.device
) -> Iterator[tuple[torch.optim.Optimizer, Callable[[int], int]]]:
    """Run real steps of a unit to measure them. Its values, mode and device are afterwards what they were.

    Args:
        local: the unit.
        shape: of its input for one image.
        optimizer: of its parameters.
        device: to run on.

    Yields:
        The optimizer, and a function from a batch size to the bytes of a step.
    """
    like = next(local.parameters())
    before, modes, home = copy.deepcopy(local.state_dict()), _modes(local), like.device
    local.to(device).train()
    trains = optimizer(local.trained())

    def bytes_at(batch: int) -> int:
        x = torch.randn(batch, *shape, device=device, dtype=like.dtype)
        target = torch.zeros(batch, dtype=torch.int64, device=device)
        resident = resident_bytes(local, trains) + x.nbytes + target.nbytes
        return resident + allocated_peak(lambda: local.step(x, target, trains), device)

    try:
        bytes_at(BATCH_SIZES[0])  # compiles, and makes the optimizer's state
        yield trains, bytes_at
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"unit {local.name}: a step of training fails: {error}") from error
    finally:
        local.to(home).load_state_dict(before)
        for module, mode in modes.items():
            module.training = mode


def _modes(module: nn.Module) -> dict[nn.Module, bool]:
    return {each: each.training for each in module.modules()}


def profiled(
    local: LocalUnit,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    optimizer: Optimizer,
    device: torch.device,
    budget: float,
    limit: int,
) -> UnitProfile:
    """Of one unit.

    Args:
        local: the unit.
        shapes: of its input and of its output, for one image.
        optimizer: of its parameters.
        device: that it is to be trained on.
        budget: bytes that the largest batch may take.
        limit: the largest batch.

    Raises:
        ValueError: a step fails.
    """
    with steps_of(local, shapes[0], optimizer, device) as (trains, bytes_at):
        first = UnitProfile(
            name=local.name,
            shape=shapes[1],
            input_bytes=torch.Size(shapes[0]).numel() * next(local.parameters()).element_size(),
            parameters=sum(parameter.numel() for parameter in local.parameters()),
            resident=resident_bytes(local, trains),
            points=tuple((batch, bytes_at(batch)) for batch in BATCH_SIZES),
        )
        return _extended(fitted(first), bytes_at, budget, limit)


def _extended(profile: UnitProfile, bytes_at: Callable[[int], int], budget: float, limit: int) -> UnitProfile:
    """With a point at the largest batch that may fit, and one between where there is no line."""
    largest = int(min(profile.largest(budget), limit))
    if largest <= BATCH_SIZES[-1]:
        return profile
    profile = fitted(replace(profile, points=(*profile.points, (largest, bytes_at(largest)))))
    between = (BATCH_SIZES[-1] + largest) // 2
    if profile.linear or between <= BATCH_SIZES[-1]:
        return profile
    points = sorted([*profile.points, (between, bytes_at(between))])
    return fitted(replace(profile, points=tuple(points)))

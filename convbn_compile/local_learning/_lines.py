"""The bytes of a step of a unit by its batch size, as points and as a line."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from tabulate import tabulate

from convbn_compile._extras import require
from convbn_compile.estimate import MIB

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
        before: bytes of the units before it, where they stay in memory to compute its input.
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
    before: int = 0

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
        axes.set(xlabel="batch size", ylabel="MiB at the peak of a step", xlim=(0, None), ylim=(0, None))
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

"""Scaling coefficients as text and as a plot, with what follows for the user; arXiv 2305.11624, Figure 2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convbn_compile._extras import require
from convbn_compile._grouped import grouped, pattern
from convbn_compile.scaling import LARGE, SMALL, NormScale, ScalingReport, scale_table

UNEVEN = 10.0
"""From here on learning rates that differ by this factor are worth a word."""

NEAR_ONE = 2.0
"""Rates within this factor of 1 are as good as Eval's."""

FORMATS = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
"""Of plots: suffixes of files, of those that matplotlib knows."""

BINS = 80
LINE_INCHES, MOST_LINES = 0.15, 160
TINY = 1e-100
"""In place of 0, at which the axis is evaluated before it has limits."""

SCALE = r"scale  $|\gamma|\,/\,\sqrt{\sigma^2+\epsilon}$"
COLOR, SHADE = "tab:blue", "0.93"


def text(report: ScalingReport, *, every: bool = False) -> str:
    """The table, the facts in one line, and what follows from them.

    Args:
        report: of scaling_coefficients.
        every: a line for each norm; otherwise norms of like paths share one.
    """
    rows = _rows(report, every=every)
    parts = [scale_table(rows)] if rows else []
    rates = report.all.sgd_rates
    return "\n\n".join([*parts, report.summary(), *([advice(*rates)] if rates else [])])


def advice(least: float, most: float) -> str:
    """What the least and the most of SGD's rates mean for training in Deploy mode, in a line."""
    rates = f"{least:.2g} to {most:.2g} times Eval's rate"
    adams = f"Adam at {_root(least)} to {_root(most)} times"
    if most > UNEVEN * least:
        return (
            f"SGD in Deploy mode, on folded weights, would train these channels at {rates}, {adams}. "
            "Fine-tune in Tune mode: it has Eval's gradients."
        )
    alike = "All channels have nearly the same scale: SGD in Deploy mode, on folded weights, would train them at"
    if least >= 1 / NEAR_ONE and most <= NEAR_ONE:
        return f"{alike} {rates}. So it is with weights that were never trained."
    middle = math.sqrt(least * most)
    return (
        f"{alike} {rates}, {adams}. There, one learning rate divided by {middle:.2g}, with Adam by {_root(middle)}, "
        "suits them all; Tune mode has Eval's gradients and takes Eval's rate."
    )


def _root(rate: float) -> str:
    return f"{math.sqrt(rate):.2g}"


def _rows(report: ScalingReport, *, every: bool) -> list[tuple[str, NormScale]]:
    """Each norm; or norms of like paths, such as layer*.*.bn2 (16), as one."""
    if every:
        return [(norm.module, norm) for norm in report.norms]
    groups = grouped(report.norms, lambda norm: pattern(norm.module))
    return [(_name(norms), NormScale.sum("", norms)) for norms in groups]


def _name(norms: Sequence[NormScale]) -> str:
    path = norms[0].module
    return path if len(norms) == 1 else f"{pattern(path)} ({len(norms)})"


def plot(report: ScalingReport, file: Path, *, title: str = "Scaling coefficients") -> None:
    """A histogram of all channels' scales, over the range and median of each norm's; log x axis.

    Norms of like paths share a line if there are more than MOST_LINES.

    Args:
        report: of scaling_coefficients, with at least one norm.
        file: to write; its suffix, such as .png or .svg, is the format.
        title: over the plot.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: no norm has a scale above 0, or the suffix is no format.
    """
    figure_module = require("matplotlib.figure", extra="bench")
    scales = [value for value in report.all.values if value > 0]
    if not scales:
        raise ValueError("There is nothing to plot: no norm has running statistics and a scale above 0.")
    rows = _rows(report, every=len(report.norms) <= MOST_LINES)
    height = LINE_INCHES * len(rows)
    figure = figure_module.Figure(figsize=(8, 3.6 + height), layout="constrained")
    histogram, ranges = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 0.4 + height))
    _histogram(histogram, scales)
    _ranges(ranges, [(name, scale) for name, scale in rows if scale.max > 0])
    zeros = report.all.channels - len(scales)
    ranges.set_xlabel(SCALE + (f"   ({zeros} channels of scale 0 not shown)" if zeros else ""))
    figure.suptitle(title)
    figure.savefig(file, dpi=150)


def _histogram(axes: Any, scales: list[float]) -> None:
    low, high = (math.log10(bound(scales)) for bound in (min, max))
    margin = max(0.03 * (high - low), (1 - (high - low)) / 2)  # at least a decade
    low, high = low - margin, high + margin
    edges = [10 ** (low + (high - low) * index / BINS) for index in range(BINS + 1)]
    axes.set_xscale("log")
    axes.hist(scales, bins=edges, color=COLOR)
    axes.set(ylabel="channels", xlim=(edges[0], edges[-1]))
    axes.xaxis.set_minor_formatter("")
    rates = axes.secondary_xaxis("top", functions=(_inverse_square, _inverse_root))
    rates.set_xlabel("SGD's learning rate in Deploy mode, times Eval's: 1 / scale²")
    _shade(axes)


def _ranges(axes: Any, rows: list[tuple[str, NormScale]]) -> None:
    for line, (_, scale) in enumerate(rows):
        lowest = min(value for value in scale.values if value > 0)
        axes.plot((lowest, scale.max), (line, line), color=COLOR, linewidth=1.5, solid_capstyle="round")
        axes.plot(scale.median, line, "o", color=COLOR, markersize=3.5)
    axes.set(ylim=(len(rows) - 0.4, -0.6))
    axes.set_title("range and median of each norm; grey: SGD's rate a hundred times off and more", fontsize="medium")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=7)
    axes.tick_params(axis="y", length=0)
    _shade(axes)


def _shade(axes: Any) -> None:
    """Grey where SGD's rate is more than a hundred times off."""
    left, right = axes.get_xlim()
    axes.axvspan(min(left, SMALL), SMALL, color=SHADE, zorder=0)
    axes.axvspan(LARGE, max(right, LARGE), color=SHADE, zorder=0)
    axes.set_xlim(left, right)
    axes.spines["right"].set_visible(False)


def _inverse_square(scale: Any) -> Any:
    return scale.clip(TINY) ** -2.0


def _inverse_root(rate: Any) -> Any:
    return rate.clip(TINY) ** -0.5

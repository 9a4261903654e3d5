"""Plots of a benchmark: memory and time against size (arXiv 2305.11624, Figure 3), and against each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convbn_compile._extras import require
from convbn_compile.benchmark import MIB, Benchmark, Row

AXES = {"batch": "batch size", "size": "resolution"}
PANEL_INCHES = (5.2, 3.8)


def plot(benchmark: Benchmark, file: Path, *, title: str = "") -> None:
    """Memory and time against batch size and against resolution, where there are several; then against each other.

    Memory is the peak on CUDA, and the bytes saved for backward on a CPU. In the last panel, of the last batch size and
    resolution, lines join what differs in its memory budget only: there is one for each dtype.

    Args:
        benchmark: with at least one contender that ran.
        file: to write; its suffix, such as .png or .svg, is the format.
        title: over the plot.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: no contender ran.
    """
    figure_module = require("matplotlib.figure", extra="bench")
    rows = [row for row in benchmark.rows if _memory(row) is not None and row.median is not None]
    if not rows:
        raise ValueError("There is nothing to plot: no contender ran forward and backward.")
    swept = [axis for axis in AXES if len({getattr(row, axis) for row in rows}) > 1]
    panels = 2 * len(swept) + 1
    figure = figure_module.Figure(figsize=(PANEL_INCHES[0] * panels, PANEL_INCHES[1]), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    labels = list(dict.fromkeys(_label(row, rows) for row in rows))
    colors = {label: f"C{number % 10}" for number, label in enumerate(labels)}
    for number, axis in enumerate(swept):
        _against(axes[2 * number : 2 * number + 2], axis, rows, colors)
    _against_each_other(axes[-1], [row for row in rows if _setting(row) == _setting(rows[-1])], rows, colors)
    figure.suptitle(title)
    figure.savefig(file, dpi=110)


def _against(axes: Sequence[Any], axis: str, rows: Sequence[Row], colors: dict[str, str]) -> None:
    """Two panels, memory and time, at the first value of the other axis."""
    other = next(name for name in AXES if name != axis)
    fixed = getattr(rows[0], other)
    for label, color in colors.items():
        line = sorted((r for r in rows if _label(r, rows) == label and getattr(r, other) == fixed), key=_key(axis))
        points = [getattr(row, axis) for row in line]
        axes[0].plot(points, [_memory(row) for row in line], "o-", color=color, label=label)
        axes[1].plot(points, [_milliseconds(row) for row in line], "o-", color=color)
    at = "" if fixed is None else f"{AXES[other]} {fixed}"
    for panel, quantity in zip(axes, (_memory_label(rows), "step, ms"), strict=True):
        panel.set(xlabel=AXES[axis], ylabel=quantity, title=at, ylim=(0, None))
    axes[0].legend(fontsize="small")


def _key(axis: str) -> Any:
    return lambda row: getattr(row, axis)


def _against_each_other(panel: Any, rows: Sequence[Row], every: Sequence[Row], colors: dict[str, str]) -> None:
    """Memory against time at one batch size and resolution."""
    for row in rows:
        label = _label(row, every)
        panel.plot(_memory(row), _milliseconds(row), "o", color=colors[label], label=label)
    for line in dict.fromkeys(map(_front, rows)):
        front = [row for row in rows if _front(row) == line]
        front.sort(key=lambda row: _memory(row) or 0)
        panel.plot([_memory(row) for row in front], [_milliseconds(row) for row in front], "-", color="0.7", zorder=0)
    last = rows[-1]
    at = ", ".join(f"{text} {getattr(last, axis)}" for axis, text in AXES.items() if getattr(last, axis) is not None)
    panel.set(xlabel=_memory_label(every), ylabel="step, ms", title=at, xlim=(0, None), ylim=(0, None))
    panel.legend(fontsize="small")


def _setting(row: Row) -> tuple[int, int | None]:
    return row.batch, row.size


def _front(row: Row) -> tuple[str, str]:
    """What rows have in common that differ in their memory budget only, at one batch size and resolution."""
    return row.contender.partition("@")[0], row.dtype


def _label(row: Row, rows: Sequence[Row]) -> str:
    several = len({other.dtype for other in rows}) > 1
    return f"{row.label}, {row.dtype}" if several else row.label


def _memory(row: Row) -> float | None:
    number = row.saved_bytes if row.reserved_bytes is None else row.peak_bytes
    return None if number is None else number / MIB


def _memory_label(rows: Sequence[Row]) -> str:
    return "saved for backward, MiB" if rows[0].reserved_bytes is None else "peak memory, MiB"


def _milliseconds(row: Row) -> float:
    assert row.median is not None, "rows without steps are not plotted"
    return 1e3 * row.median

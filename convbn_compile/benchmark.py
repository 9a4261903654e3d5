"""What a benchmark found: Row and Benchmark, and their table."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

MIB = 2**20


@dataclass(frozen=True)
class Row:
    """What one contender took at one setting; None is what was not measured, or does not apply.

    Attributes:
        contender: its name.
        label: what tables call it.
        batch: of the first input.
        size: the last dimension of the first input that has three or more.
        dtype: of the model and the inputs, or autocast-DTYPE.
        because: why it could not run; empty if it could.
        seconds: of each timed step, forward and backward, in the order of the rounds; forward only for inference.
        ratio: the median of its steps over the reference's in the same rounds; not for inference.
        saved_bytes: kept between forward and backward, parameters, buffers and inputs not counted.
        peak_bytes: on CUDA what tensors held at most, weights included; on a CPU by how much the process grew at most.
        reserved_bytes: what CUDA's allocator held at most.
        cold_seconds: of the first compile, less a step.
        warm_seconds: likewise, from the compile caches on disk.
        kernels: that Inductor generated, forward and backward; torch's own operators are not among them.
        convolutions: calls in a step: forward, those that are computed again included, and backward, where one call
            computes one gradient or two.
    """

    contender: str
    label: str
    batch: int
    size: int | None
    dtype: str
    because: str = ""
    seconds: tuple[float, ...] = ()
    ratio: float | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    cold_seconds: float | None = None
    warm_seconds: float | None = None
    kernels: int | None = None
    convolutions: tuple[int, int] | None = None

    @property
    def median(self) -> float | None:
        """Seconds of a step."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def spread(self) -> float | None:
        """The range of the middle half of the steps, in seconds."""
        if len(self.seconds) < 2:
            return None
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return high - low


@dataclass(frozen=True)
class Benchmark:
    """Rows, one for each setting and contender, and under what they were measured; str() is a table.

    Below it is said what the ratios are to, and who could not run and why.
    """

    configuration: Mapping[str, Any]
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        return {"configuration": dict(self.configuration), "rows": [dataclasses.asdict(row) for row in self.rows]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Benchmark:
        """The inverse of to_dict, also after JSON made lists of tuples."""
        return cls(data["configuration"], tuple(_row(item) for item in data["rows"]))

    def __str__(self) -> str:
        ran = tabulate(*table([row for row in self.rows if not row.because]), disable_numparse=True)
        notes = [*(references(self) if ran else ()), *reasons(self.rows)]
        return "\n\n".join(part for part in (ran, "\n".join(notes)) if part)


def _row(item: Mapping[str, Any]) -> Row:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in item.items()}
    return Row(**values)


# --- the table ---------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> tuple[list[list[str]], list[str]]:
    """Lines and headers; columns in which nothing was measured are left out."""
    columns = {name: [_shown(name, row) for row in rows] for name in COLUMNS}
    headers = [name for name, cells in columns.items() if any(cells)]
    return [list(line) for line in zip(*(columns[name] for name in headers), strict=True)], headers


def _shown(column: str, row: Row) -> str:
    value = COLUMNS[column](row)
    return "" if value is None else str(value)


def _number(value: float | None, form: str, unit: float = 1) -> str | None:
    return None if value is None else format(value / unit, form)


COLUMNS: Mapping[str, Any] = {
    "contender": lambda row: row.label,
    "batch": lambda row: row.batch,
    "size": lambda row: row.size,
    "dtype": lambda row: row.dtype,
    "step, ms": lambda row: _number(row.median, ".1f", 1e-3),
    "spread": lambda row: _number(row.spread, ".1f", 1e-3),
    "ratio": lambda row: _number(row.ratio, ".3f"),
    "saved, MiB": lambda row: _number(row.saved_bytes, ".2f", MIB),
    "peak, MiB": lambda row: _number(row.peak_bytes, ".1f", MIB),
    "reserved, MiB": lambda row: _number(row.reserved_bytes, ".1f", MIB),
    "cold, s": lambda row: _number(row.cold_seconds, ".1f"),
    "warm, s": lambda row: _number(row.warm_seconds, ".1f"),
    "kernels": lambda row: row.kernels,
    "convolutions": lambda row: row.convolutions and "{} + {}".format(*row.convolutions),
}


def references(benchmark: Benchmark) -> list[str]:
    """What the ratios are to, and where there is none because the reference could not run."""
    rows = [row for row in benchmark.rows if row.contender == benchmark.configuration.get("reference")]
    ran, failed = ([row for row in rows if bool(row.because) is failed] for failed in (False, True))
    lines = []
    if ran and any(row.ratio is not None for row in benchmark.rows):
        lines.append(f"ratio: to {ran[0].label}, pair by pair, median of {_steps(ran[0])}")
    if failed:
        at = f" at {'; '.join(map(_setting, failed))}" if ran else ""
        lines.append(f"no ratio{at}: the reference, {failed[0].label}, could not run")
    return lines


def _steps(row: Row) -> str:
    return f"{len(row.seconds)} step{'s' * (len(row.seconds) != 1)}"


def reasons(rows: Sequence[Row]) -> list[str]:
    """A line for each contender that could not run, and for each reason."""
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.because:
            lines.setdefault((row.label, row.because), []).append(_setting(row))
    everywhere = len({_setting(row) for row in rows})
    at = {key: "" if len(where) == everywhere else f" at {'; '.join(where)}" for key, where in lines.items()}
    return [f"{label} could not run{at[label, because]}: {because}" for label, because in lines]


def _setting(row: Row) -> str:
    sizes = [f"{name} {value}" for name, value in (("batch", row.batch), ("size", row.size)) if value is not None]
    return ", ".join([*sizes, row.dtype])

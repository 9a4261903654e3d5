"""What was rewritten, what was not and why: NoMatch, Rewrite, Refusal, Report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tabulate import tabulate

Kind = Literal["batch norm", "affine"]
"""A batch norm of torch, or a scale and shift per channel that somebody wrote by hand, such as FrozenBatchNorm."""


@dataclass(frozen=True)
class NoMatch:
    """Why an identity does not apply to a node."""

    reason: str


@dataclass(frozen=True)
class Rewrite:
    """One convolution-norm pair that was folded; `module` is the norm's path, such as layer1.0.bn2."""

    module: str
    kind: Kind = "batch norm"


@dataclass(frozen=True)
class Refusal:
    """One norm that was left alone; `module` is its path, such as layer1.0.bn2."""

    module: str
    reason: str
    kind: Kind = "batch norm"


@dataclass(frozen=True)
class Report:
    """What the joint pass did to one graph, or to all graphs of a model.

    Attributes:
        rewrites: the pairs that were folded, in the order of the graph.
        refused: the norms that were left alone, each with its reason.
        merged: convolutions removed by branch merging.
        saved_bytes_before: bytes saved for backward by plain Inductor, parameters, buffers and inputs not counted;
            None if not measured.
        saved_bytes_after: the same after the rewrite.
    """

    rewrites: tuple[Rewrite, ...] = ()
    refused: tuple[Refusal, ...] = ()
    merged: int = 0
    saved_bytes_before: int | None = None
    saved_bytes_after: int | None = None

    @property
    def folded(self) -> int:
        """How many convolution-norm pairs were folded."""
        return len(self.rewrites)

    @property
    def norms(self) -> int:
        """How many norms there are, those written by hand included."""
        return len(self.rewrites) + len(self.refused)

    def summary(self) -> str:
        """The facts in one line."""
        parts = [f"folded {self.folded} of {self.norms} norms"]
        if self.saved_bytes_before is not None and self.saved_bytes_after is not None:
            parts.append(f"saved for backward {_mib(self.saved_bytes_before)} -> {_mib(self.saved_bytes_after)}")
        parts += [f"{count} left alone: {reason}" for reason, count in self.reasons().items()]
        return "; ".join(parts)

    def reasons(self) -> dict[str, int]:
        """How many norms were left alone for each reason, most frequent first."""
        counts: dict[str, int] = {}
        for refusal in self.refused:
            counts[refusal.reason] = counts.get(refusal.reason, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        return {"folded": self.folded, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The inverse of to_dict."""
        return cls(
            rewrites=tuple(Rewrite(**item) for item in data["rewrites"]),
            refused=tuple(Refusal(**item) for item in data["refused"]),
            merged=data["merged"],
            saved_bytes_before=data["saved_bytes_before"],
            saved_bytes_after=data["saved_bytes_after"],
        )

    @classmethod
    def sum(cls, reports: Iterable[Report]) -> Report:
        """One report of several graphs."""
        reports = list(reports)
        return cls(
            rewrites=tuple(item for report in reports for item in report.rewrites),
            refused=tuple(item for report in reports for item in report.refused),
            merged=sum(report.merged for report in reports),
            saved_bytes_before=_sum([report.saved_bytes_before for report in reports]),
            saved_bytes_after=_sum([report.saved_bytes_after for report in reports]),
        )

    def __str__(self) -> str:
        rows = [(rewrite.module, rewrite.kind, "folded", "") for rewrite in self.rewrites]
        rows += [(refusal.module, refusal.kind, "left alone", refusal.reason) for refusal in self.refused]
        table = tabulate(rows, headers=("norm", "kind", "outcome", "because"), disable_numparse=True)
        return f"{table}\n\n{self.summary()}"


def _sum(numbers: Sequence[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def _mib(number: int) -> str:
    return f"{number / 2**20:.2f} MiB"

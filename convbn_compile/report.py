"""What was rewritten, what was not and why: NoMatch, Rewrite, Refusal, Report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tabulate import tabulate

Kind = Literal["batch norm", "affine", "branches"]
"""A batch norm of torch; a scale and shift per channel that somebody wrote by hand, such as FrozenBatchNorm; or a sum
of convolutions of one input."""


@dataclass(frozen=True)
class NoMatch:
    """Why an identity does not apply to a node."""

    reason: str


@dataclass(frozen=True)
class Rewrite:
    """A convolution-norm pair that was folded, or branches that were merged.

    `module` is the path of the norm, such as layer1.0.bn2, or of the module that adds the branches up.
    """

    module: str
    kind: Kind = "batch norm"


@dataclass(frozen=True)
class Refusal:
    """A norm, or a sum of branches, that was left alone; `module` is as in Rewrite."""

    module: str
    reason: str
    kind: Kind = "batch norm"


@dataclass(frozen=True)
class Report:
    """What the joint pass did to one graph, or to all graphs of a model.

    Attributes:
        rewrites: the pairs that were folded and the branches that were merged, in the order of the graph.
        refused: the norms and branches that were left alone, each with its reason.
        merged: convolutions removed by branch merging.
        saved_bytes_before: bytes saved for backward by plain Inductor, parameters, buffers and inputs not counted;
            None if not measured.
        saved_bytes_after: the same after the rewrite.
        notes: what else there is to say of a graph, such as that another memory budget serves better.
    """

    rewrites: tuple[Rewrite, ...] = ()
    refused: tuple[Refusal, ...] = ()
    merged: int = 0
    saved_bytes_before: int | None = None
    saved_bytes_after: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def folded(self) -> int:
        """How many convolution-norm pairs were folded."""
        return sum(item.kind != "branches" for item in self.rewrites)

    @property
    def norms(self) -> int:
        """How many norms there are, those written by hand included."""
        return self.folded + sum(item.kind != "branches" for item in self.refused)

    def totals(self) -> str:
        """The numbers in one line."""
        parts = [f"folded {self.folded} of {self.norms} norms"]
        parts += [f"merged away {self.merged} convolutions"] if self.merged else []
        if self.saved_bytes_before is not None and self.saved_bytes_after is not None:
            parts.append(f"saved for backward {_mib(self.saved_bytes_before)} -> {_mib(self.saved_bytes_after)}")
        return "; ".join([*parts, *self.notes])

    def summary(self) -> str:
        """The numbers in one line, and the reasons."""
        return "; ".join([self.totals(), *(f"{count} left alone: {why}" for why, count in self.reasons().items())])

    def reasons(self, *kinds: Kind) -> dict[str, int]:
        """How many were left alone for each reason, most frequent first; of some kinds only, if they are given."""
        refused = [refusal for refusal in self.refused if not kinds or refusal.kind in kinds]
        return dict(Counter(refusal.reason for refusal in refused).most_common())

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
            notes=tuple(data["notes"]),
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
            notes=tuple(note for report in reports for note in report.notes),
        )

    def __str__(self) -> str:
        done = {"branches": "merged"}
        rows = [(rewrite.module, rewrite.kind, done.get(rewrite.kind, "folded"), "") for rewrite in self.rewrites]
        rows += [(refusal.module, refusal.kind, "left alone", refusal.reason) for refusal in self.refused]
        table = tabulate(rows, headers=("norm", "kind", "outcome", "because"), disable_numparse=True)
        return f"{table}\n\n{self.summary()}"


def _sum(numbers: Sequence[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def _mib(number: int) -> str:
    return f"{number / 2**20:.2f} MiB"

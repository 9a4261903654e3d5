"""How far a run of NeuroFlux is: what its manifest says."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

Entry = dict[str, Any]
"""Of a file: its name and its checksum."""


@dataclass
class State:
    """Changed as the run goes on, and committed after each change that counts.

    Attributes:
        settings: what a run that goes on must have in common with the one that began.
        plan: names, batch size and predicted bytes of each block.
        start: values before training.
        augmented: whether images are others when they are read again.
        block: which is trained now, or is to be next; their number at the end.
        epoch: how many epochs of it are done.
        checkpoint: of the block, after the last epoch.
        source: where its input comes from; None as long as that is not decided.
        cuts: the blocks whose outputs have been in a cache.
        cache: of the last of them, for "train" and "val": "rows" and "labels"; None before the first.
        finished: values of the blocks that are done.
        runs: what they took.
        history: of every epoch: block, epoch, seconds since the beginning, losses and accuracies of the block's exits.
        seconds: of the block so far.
        throughput: images a second of exits over those of the whole network, by the number of the unit, at the end.
    """

    settings: dict[str, Any]
    plan: list[dict[str, Any]]
    start: Entry
    augmented: bool
    block: int = 0
    epoch: int = 0
    checkpoint: Entry | None = None
    source: str | None = "data"
    cuts: list[int] = field(default_factory=list)
    cache: dict[str, dict[str, Entry]] | None = None
    finished: list[Entry] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    throughput: dict[str, float] = field(default_factory=dict)

    @property
    def entries(self) -> list[Entry]:
        """Of all files that are still needed."""
        cached = [entry for entries in (self.cache or {}).values() for entry in entries.values()]
        return [self.start, *self.finished, *cached, *([self.checkpoint] if self.checkpoint else [])]

    @property
    def total_seconds(self) -> float:
        """Of all blocks so far."""
        return self.seconds + sum(float(run["seconds"]) for run in self.runs)

    @property
    def accuracies(self) -> list[float]:
        """Of every exit so far."""
        last = {each["block"]: each["accuracies"] for each in self.history}
        return [accuracy for block in sorted(last) for accuracy in last[block]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    @staticmethod
    def read(manifest: dict[str, Any], settings: dict[str, Any], folder: Any) -> State:
        """Of a manifest.

        Raises:
            ValueError: it is of a run with other settings, or of something else.
        """
        known = {each.name for each in fields(State)}
        if manifest.keys() != known or not isinstance(manifest["settings"], dict):
            raise ValueError(f"storage: {folder} holds no run of this version of NeuroFlux. Use another folder.")
        state = State(**manifest)
        for name, value in settings.items():
            if state.settings.get(name) != value:
                which, theirs, ours = _difference(name, state.settings.get(name), value)
                raise ValueError(
                    f"storage: {folder} holds a run with {which} = {theirs!r}, here it is {ours!r}. Use the same to go "
                    "on with that run, or another folder for a new one."
                )
        return state


def _difference(name: str, theirs: Any, ours: Any) -> tuple[str, Any, Any]:
    """Where two values differ: of lists of one length, the first of their items that do."""
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        pairs = enumerate(zip(theirs, ours, strict=True))
        return next(_difference(f"{name}[{index}]", *pair) for index, pair in pairs if pair[0] != pair[1])
    return name, theirs, ours

"""What a run of NeuroFlux came to: blocks, exits, and the network that is exported beside the whole one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from convbn_compile._arguments import shown
from convbn_compile.estimate import MIB


@dataclass(frozen=True)
class Exit:
    """The network up to a unit, with the unit's head as its classifier.

    Attributes:
        unit: number of the unit.
        name: of the unit.
        accuracy: on the validation data, from 0 to 1.
        parameters: of the units up to here and the head.
    """

    unit: int
    name: str
    accuracy: float
    parameters: int


@dataclass(frozen=True)
class BlockRun:
    """What training one block took.

    Attributes:
        names: of its units.
        batch_size: of training.
        predicted: bytes of a step at the peak, by the plan.
        measured: the same, measured.
        seconds: of all of it, from the choice of its input to its last file.
        source: where its input came from: "data", "cache" or "recomputed".
    """

    names: tuple[str, ...]
    batch_size: int
    predicted: int
    measured: int
    seconds: float
    source: str


@dataclass(frozen=True)
class Report:
    """A finished run.

    Attributes:
        memory_budget: bytes that a step might take.
        blocks: in order.
        exits: in order.
        history: of every epoch: its block and number, seconds since the beginning, and of the exits of the block
            their losses and accuracies.
        chosen: the exit that export() returns.
        parameters: of the whole network.
        throughput: images a second of the chosen exit over those of the whole network.
    """

    memory_budget: int
    blocks: tuple[BlockRun, ...]
    exits: tuple[Exit, ...]
    history: tuple[dict[str, Any], ...]
    chosen: Exit
    parameters: int
    throughput: float

    @property
    def seconds(self) -> float:
        """Of all blocks."""
        return sum(block.seconds for block in self.blocks)

    @property
    def peak(self) -> int:
        """The largest measured bytes of a block."""
        return max(block.measured for block in self.blocks)

    def seconds_to(self, accuracy: float) -> float | None:
        """After how many seconds of training an exit was so accurate for the first time; None if none was.

        Args:
            accuracy: a share of images, from 0 to 1.

        Raises:
            ValueError: it is none.
        """
        if not isinstance(accuracy, (int, float)) or not 0 <= accuracy <= 1:
            raise ValueError(f"seconds_to: accuracy is a share of images, from 0 to 1, got {shown(accuracy)}.")
        reached = (epoch["seconds"] for epoch in self.history if max(epoch["accuracies"]) >= accuracy)
        return next(reached, None)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return asdict(self)

    def __str__(self) -> str:
        blocks = [
            [
                index,
                title(block.names),
                block.batch_size,
                f"{block.predicted / MIB:.2f}",
                f"{block.measured / MIB:.2f}",
                f"{block.seconds:.1f}",
                block.source,
            ]
            for index, block in enumerate(self.blocks)
        ]
        heads = ("block", "units", "batch size", "MiB predicted", "MiB measured", "seconds", "input")
        conclusion = (
            f"Exit {self.chosen.name}: {self.parameters / self.chosen.parameters:.2f} times fewer parameters than "
            f"the whole network, {self.throughput:.2f} times its images a second. {self.seconds:.1f} s, "
            f"{self.peak / MIB:.2f} of {self.memory_budget / MIB:.2f} MiB."
        )
        return "\n\n".join([tabulate(blocks, headers=heads), exits_table(self.exits, self.chosen), conclusion])


def title(names: Sequence[str]) -> str:
    """Of a block, from the names of its units."""
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def exits_table(exits: Sequence[Exit], chosen: Exit) -> str:
    """A line for each."""
    rows = [
        [exit_.name, f"{exit_.accuracy:.4f}", f"{exit_.parameters:,}", "chosen" if exit_ == chosen else ""]
        for exit_ in exits
    ]
    headers = ("exit", "accuracy", "parameters", "")
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", "right", "right", "left"))

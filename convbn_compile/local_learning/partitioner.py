"""The Partitioner: which units are trained together, and by which batch, so that it fits a budget of memory.

    M_k(b) = before_k + sum_{l in k} resident_l + max_{l in k} (p_l - resident_l + (q_l + x_l) b)
    B_k    = clamp(floor(b : M_k(b) = s budget), 1, limit),   s = 1 - margin

before_k are the bytes of all units before the block where they compute its input always (cache="never"), else 0;
resident_l are the bytes of unit l's parameters, buffers and optimizer state, all of which are there while the block
is; p_l and q_l are the Profiler's; x_l are the bytes of the block's input for an image, which is there beside that of
unit l itself, and 0 for the first unit, whose input it is. A block opens at unit i with B_i, the batch of the unit
alone, and takes on the next unit l while |B_l - B_i| <= similarity B_i and the batch of all of them together is not
below (1 - similarity) B_i.
Source: NeuroFlux (arXiv 2402.14139); its grouping rule is not public, this is the one that its figures suggest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate

from convbn_compile.estimate import MIB
from convbn_compile.local_learning._lines import UnitProfile
from convbn_compile.local_learning.report import title


@dataclass(frozen=True)
class Block:
    """Units that are trained together.

    Attributes:
        first: number of the first unit.
        names: of the units.
        batch_size: what they are trained with.
        predicted: bytes of a step, at the peak.
        resident: those of them that are there before and after it.
    """

    first: int
    names: tuple[str, ...]
    batch_size: int
    predicted: int
    resident: int

    @property
    def units(self) -> range:
        """Numbers of its units."""
        return range(self.first, self.first + len(self.names))


@dataclass(frozen=True)
class Plan:
    """The blocks of a network, in order.

    Attributes:
        blocks: the blocks.
        memory_budget: bytes that a step may take.
        margin: the share of them that is left free.
    """

    blocks: tuple[Block, ...]
    memory_budget: int
    margin: float

    @property
    def least_batch(self) -> int:
        """The smallest of all blocks, by which blocks that are done are run."""
        return min(block.batch_size for block in self.blocks)

    def __str__(self) -> str:
        rows = [
            [
                index,
                title(block.names),
                len(block.names),
                block.batch_size,
                f"{block.predicted / MIB:.2f}",
            ]
            for index, block in enumerate(self.blocks)
        ]
        budget = f"{self.memory_budget / MIB:.2f} MiB, of which {100 * self.margin:.0f} % are left free"
        return budget + "\n" + tabulate(rows, headers=("block", "units", "number", "batch size", "MiB predicted"))


@dataclass(frozen=True)
class Partitioner:
    """Makes a plan.

    Attributes:
        memory_budget: bytes.
        margin: the share of them that is left free.
        limit: the largest batch.
        similarity: by how much, relatively, batches in a block may differ.
    """

    memory_budget: int
    margin: float
    limit: int
    similarity: float

    def plan(self, units: Sequence[UnitProfile]) -> Plan:
        """The blocks of a network.

        Raises:
            ValueError: a unit does not fit with a single image.
        """
        self._check(max(units, key=lambda unit: self._bytes_at([unit], 1)))
        groups: list[list[UnitProfile]] = []
        for unit in units:
            if groups and self._joins(groups[-1], unit):
                groups[-1].append(unit)
            else:
                groups.append([unit])
        blocks, first = [], 0
        for group in groups:
            batch = self._batch(group)
            predicted = math.ceil(self._bytes_at(group, batch))
            names = tuple(unit.name for unit in group)
            blocks.append(Block(first, names, batch, predicted, _resident(group)))
            first += len(group)
        return Plan(tuple(blocks), self.memory_budget, self.margin)

    def _joins(self, group: Sequence[UnitProfile], unit: UnitProfile) -> bool:
        if self._bytes_at([*group, unit], 1) > self._usable:
            return False
        alone, opened, together = self._batch([unit]), self._batch(group[:1]), self._batch([*group, unit])
        return abs(alone - opened) <= self.similarity * opened and together >= (1.0 - self.similarity) * opened

    @property
    def _usable(self) -> float:
        return self.memory_budget * (1.0 - self.margin)

    def _bytes_at(self, group: Sequence[UnitProfile], batch: int) -> float:
        """M_k(b)."""
        return _resident(group) + max(unit.passing + slope * batch for unit, slope in _slopes(group))

    def _batch(self, group: Sequence[UnitProfile]) -> int:
        """B_k."""
        left = self._usable - _resident(group)
        largest = min((left - unit.passing) / slope if slope else self.limit for unit, slope in _slopes(group))
        return max(1, int(min(largest, self.limit)))

    def _check(self, unit: UnitProfile) -> None:
        needed = self._bytes_at([unit], 1)
        if needed > self._usable:
            least = math.ceil(100 * needed / (1.0 - self.margin) / MIB) / 100
            before = f" with {unit.before / MIB:.2f} of the units before it" if unit.before else ""
            raise ValueError(
                f"memory_budget: unit {unit.name} does not fit into {self.memory_budget / MIB:.2f} MiB with a single "
                f"image, which takes {needed / MIB:.2f} MiB{before} beside a margin of {100 * self.margin:.0f} %. The "
                f"least budget for it is {least:.2f} MiB."
            )


def _resident(group: Sequence[UnitProfile]) -> int:
    """Bytes that are there before and after a step."""
    return group[0].before + sum(unit.resident for unit in group)


def _slopes(group: Sequence[UnitProfile]) -> list[tuple[UnitProfile, float]]:
    """Each unit of a block, and q_l + x_l."""
    first, *others = group
    return [(first, first.slope), *((unit, unit.slope + first.input_bytes) for unit in others)]

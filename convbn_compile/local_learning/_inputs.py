"""The inputs of blocks: whether they are cached or computed again, and the caches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from convbn_compile.estimate import MIB
from convbn_compile.local_learning._cache import Cache, CacheWriter, Rounding, cache_bytes
from convbn_compile.local_learning._choice import Costs, choose
from convbn_compile.local_learning._disk import speed_of
from convbn_compile.local_learning._local import seeded
from convbn_compile.local_learning._network import Network
from convbn_compile.local_learning._offloading import Offloading
from convbn_compile.local_learning._source import Images, Source, Through
from convbn_compile.local_learning._state import Entry, State
from convbn_compile.local_learning._training import Training, logger
from convbn_compile.local_learning.partitioner import Plan
from convbn_compile.local_learning.storage import SPLITS, Storage
from convbn_compile.local_learning.worker import in_order
from convbn_compile.measure import allocated_peak

TIMED = 4
"""Batches by which the way to a block's input is timed."""

Bar = Callable[[int, str], Any]
"""From a total and what is done to a progress bar."""


@dataclass(frozen=True)
class Inputs:
    """Of all blocks of one run.

    Attributes:
        network: all units.
        plan: the blocks.
        training: how they are trained.
        data: the images, for "train" and "val".
        storage: where caches are.
        state: how far the run is.
        memory: what of the network is in memory.
        bar: makes progress bars.
    """

    network: Network
    plan: Plan
    training: Training
    data: Mapping[str, Images]
    storage: Storage
    state: State
    memory: Offloading
    bar: Bar

    @property
    def base(self) -> int:
        """The number of the block whose input the data or the last cache are."""
        return self.state.cuts[-1] + 1 if self.state.cache else 0

    def of(self, split: str, number: int) -> Source:
        """A block's input."""
        source = self.data[split] if self.state.cache is None else self._opened(split)
        return self._through(source, self.base, number)

    def place(self, number: int) -> None:
        """Have a block in memory, and those that its input is computed by."""
        self.memory.use(self.plan.blocks[number].units, self._before(number))

    def _before(self, number: int) -> range:
        """The units that compute a block's input."""
        return range(self._first_unit(self.base), self._first_unit(number))

    # --- the choice ----------------------------------------------------------------------------------------------

    def choose(self, number: int) -> None:
        """Decide how a block gets its input, and write its cache if it has one; what is then to be committed."""
        self.memory.use(range(0), self._before(number))
        how, why = self._choice(number)
        logger.info("block %d: its input is %s: %s", number, "cached" if how == "cache" else how, why)
        if how == "cache":
            sources = {split: self.of(split, number) for split in SPLITS}
            self.state.cache = {split: self._written(split, number - 1, sources[split]) for split in SPLITS}
            self.state.cuts.append(number - 1)
        self.state.source = how

    def _choice(self, number: int) -> tuple[str, str]:
        """Returns "cache" or "recomputed", and why."""
        if self.training.cache == "always":
            return "cache", 'cache="always"'
        source = self.of("train", number)
        fits = self._fits(number, source)
        images, size = sum(map(len, self.data.values())), self._row_bytes(number)
        reason = self._no_cache(images * size)
        if reason is not None:
            if not fits:
                logger.warning("block %d: with the blocks before it needs more than the budget", number)
            return "recomputed", reason
        batch = self.plan.blocks[number].batch_size
        began, indices = time.perf_counter(), in_order(min(len(source), TIMED * batch), batch)
        timed = sum(len(target) for _, target in source.batches(indices))
        seconds = (time.perf_counter() - began) / timed
        with self.storage.writing("probe"):
            speed = speed_of(self.storage.folder, self.storage.free)
        return choose(Costs(images, self.training.epochs, seconds, size, speed, fits))

    def _no_cache(self, size: int) -> str | None:
        """Why there can be no cache of so many bytes; None if there can."""
        if self.training.cache == "never":
            return 'cache="never"'
        if self.state.augmented:
            return "images are augmented, and a cache would hold one draw"
        free = self.storage.free
        return f"a cache takes {size / MIB:.1f} MiB, of which {free / MIB:.1f} are free" if free <= size else None

    def _fits(self, number: int, source: Source) -> bool:
        """Whether a block fits into the budget beside what computes its input, which runs once to find out."""
        block = self.plan.blocks[number]
        first = in_order(min(len(source), block.batch_size), block.batch_size)
        rise = allocated_peak(lambda: [None for _ in source.batches(first)], self.training.device)
        before = 0 if self.training.cache == "never" else source.resident  # then the plan has it
        return max(block.predicted, block.resident + rise) + before <= self.plan.memory_budget

    def _row_bytes(self, number: int) -> int:
        return cache_bytes(1, self.network.shapes[self._first_unit(number) - 1], self.training.cache_dtype)

    def _first_unit(self, number: int) -> int:
        return self.plan.blocks[number].first

    def _through(self, source: Source, first: int, number: int) -> Source:
        """A source of the input of block `first` as one of the input of block `number`."""
        if first == number:
            return source
        modules: list[nn.Module] = []
        for block in self.plan.blocks[first:number]:
            modules += [*(self.network.units[index].unit for index in block.units), *self._rounding]
        return Through(source, tuple(modules), self.plan.least_batch, self.training.device)

    @property
    def _rounding(self) -> tuple[nn.Module, ...]:
        """What a block's output goes through, so that it does not depend on a measured time whether it was cached."""
        cache = self.training.cache
        cached = cache == "always" or (cache == "auto" and not self.state.augmented)
        return (Rounding(self.training.cache_dtype),) if cached else ()

    # --- caches --------------------------------------------------------------------------------------------------

    def _opened(self, split: str) -> Source:
        """The last cache, made again if it is damaged."""
        assert self.state.cache is not None
        if not all(map(self.storage.intact, self.state.cache[split].values())):
            logger.warning("the cache of %s is missing or damaged: it is made again", split)
            with self.memory.using(range(self._first_unit(self.base))):
                source = self._through(self.data[split], 0, self.base)
                self.state.cache[split] = self._written(split, self.state.cuts[-1], source)
            self.storage.commit(self.state.to_dict(), self.state.entries)
        rows, labels = (self.state.cache[split][name] for name in ("rows", "labels"))
        return Cache(self.storage.path(rows["file"]), self.storage.load(labels), self.network.like.dtype)

    def _written(self, split: str, number: int, source: Source) -> dict[str, Entry]:
        """The outputs of a block, in a cache."""
        block, dtype = self.plan.blocks[number], self.training.cache_dtype
        shape = (len(source), *self.network.shapes[block.units[-1]])
        self.storage.check_space(cache_bytes(len(source), shape[1:], dtype))
        writer = CacheWriter(self.storage, f"cache_{number}_{split}.npy", shape, dtype)
        labels, drawn = [], [*self.state.cuts, number][0]  # images are drawn for the first cache
        with (
            self.bar(len(source), f"cache of block {number}, {split}") as bar,
            seeded(self.training.device, self.training.seed, drawn, SPLITS.index(split)),
        ):
            for x, target in source.batches(in_order(len(source), block.batch_size)):
                writer.append(x)
                labels.append(target)
                bar.update(len(target))
        named = self.storage.save(f"labels_{number}_{split}.pt", torch.cat(labels))
        return {"rows": writer.close(), "labels": named}

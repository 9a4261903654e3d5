"""The inputs of blocks: whether they are cached or computed again, and the caches."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from convbn_compile._extras import require
from convbn_compile.estimate import MIB
from convbn_compile.local_learning._choice import Costs, choose
from convbn_compile.local_learning._local import Optimizer, resident_bytes
from convbn_compile.local_learning._network import Network
from convbn_compile.local_learning._source import Cache, Images, Source, Through
from convbn_compile.local_learning._state import Entry, State
from convbn_compile.local_learning.partitioner import Plan
from convbn_compile.local_learning.storage import CacheWriter, Storage
from convbn_compile.local_learning.worker import in_order
from convbn_compile.measure import allocated_peak

logger = logging.getLogger("convbn_compile.local_learning")

SPLITS = ("train", "val")
TIMED = 4
"""Batches by which the way to a block's input is timed."""

Bar = Callable[[int, str], Any]
"""From a total and what is done to a progress bar."""


@dataclass(frozen=True)
class Training:
    """How blocks are trained.

    Attributes:
        optimizer: makes one for a unit.
        lr_batch_size: the batch that its learning rate is for.
        epochs: of each block.
        seed: of everything random.
        cache: "auto", "always" or "never".
        cache_dtype: float32 or float16.
        device: where blocks are trained.
    """

    optimizer: Optimizer
    lr_batch_size: int
    epochs: int
    seed: int
    cache: str
    cache_dtype: torch.dtype
    device: torch.device


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
        bar: makes progress bars.
    """

    network: Network
    plan: Plan
    training: Training
    data: Mapping[str, Images]
    storage: Storage
    state: State
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
        """Put a block, and those that its input is computed by, on the device, and all others on the CPU."""
        there = range(self._first_unit(self.base), self.plan.blocks[number].units.stop)
        for index, unit in enumerate(self.network.units):
            unit.to(self.training.device if index in there else "cpu")

    def choose(self, number: int) -> None:
        """Decide how a block gets its input, write its cache if it has one, and commit."""
        self.place(number)
        how, why = self._choice(number)
        logger.info("block %d: its input is %s: %s", number, "cached" if how == "cache" else how, why)
        self.state.source = how
        if how == "cache":
            self.state.cache = {split: self._written(split, number - 1, self.of(split, number)) for split in SPLITS}
            self.state.cuts.append(number - 1)
        self.storage.commit(self.state.to_dict(), self.state.entries)

    def _choice(self, number: int) -> tuple[str, str]:
        forced = {"always": "cache", "never": "recomputed"}.get(self.training.cache)
        return (forced, f'cache="{self.training.cache}"') if forced else choose(self._costs(number))

    def _costs(self, number: int) -> Costs:
        block = self.plan.blocks[number]
        source = self.of("train", number)
        indices = in_order(min(len(source), TIMED * block.batch_size), block.batch_size)
        rise = allocated_peak(lambda: [None for _ in source.batches(indices[:1])], self.training.device)
        began = time.perf_counter()
        images = sum(len(target) for _, target in source.batches(indices))
        seconds = (time.perf_counter() - began) / images
        before = [self.network.units[index] for index in range(self._first_unit(self.base), block.first)]
        peak = max(block.predicted, block.resident + rise) + sum(map(resident_bytes, before))
        return Costs(
            images=sum(map(len, self.data.values())),
            epochs=self.training.epochs,
            seconds=seconds,
            size=cache_bytes(1, self.network.shapes[block.first - 1], self.training.cache_dtype),
            speed=self.storage.speed(),
            free=self.storage.free,
            augments=self.data["train"].augments,
            fits=peak <= self.plan.memory_budget,
        )

    def _first_unit(self, number: int) -> int:
        return self.plan.blocks[number].first

    def _through(self, source: Source, first: int, number: int, rounded: torch.dtype | None = None) -> Source:
        """A source of the input of block `first` as one of the input of block `number`."""
        if first == number:
            return source
        blocks = self.plan.blocks[first:number]
        units = [self.network.units[index].eval().unit for block in blocks for index in block.units]
        chunk = min(block.batch_size for block in blocks)
        return Through(source, tuple(units), chunk, self.training.device, rounded)

    # --- caches --------------------------------------------------------------------------------------------------

    def _opened(self, split: str) -> Source:
        """The last cache, made again if it is damaged."""
        assert self.state.cache is not None
        if not all(map(self.storage.intact, self.state.cache[split].values())):
            logger.warning("the cache of %s is missing or damaged: it is made again", split)
            with self._units_on_device(range(self._first_unit(self.base))):
                self.state.cache[split] = self._written(split, self.state.cuts[-1], self._chain(split))
            self.storage.commit(self.state.to_dict(), self.state.entries)
        entries = self.state.cache[split]
        dtype = next(self.network.units[0].parameters()).dtype
        return Cache(self.storage.path(entries["rows"]["file"]), self.storage.load(entries["labels"]), dtype)

    def _chain(self, split: str) -> Source:
        """What the last cache holds, from the images through every cache that there has been."""
        source: Source = self.data[split]
        for first, cut in zip([0, *(cut + 1 for cut in self.state.cuts)], self.state.cuts, strict=False):
            source = self._through(source, first, cut + 1, self.training.cache_dtype)
        return source

    @contextmanager
    def _units_on_device(self, indices: range) -> Iterator[None]:
        units = nn.ModuleList(self.network.units[index] for index in indices)
        units.to(self.training.device)
        yield
        units.to("cpu")

    def _written(self, split: str, number: int, source: Source) -> dict[str, Entry]:
        """The outputs of a block, in a cache."""
        block, dtype = self.plan.blocks[number], self.training.cache_dtype
        shape = (len(source), *self.network.shapes[block.units[-1]])
        check_space(self.storage, cache_bytes(len(source), shape[1:], dtype))
        writer = CacheWriter(self.storage, f"cache_{number}_{split}.npy", shape, dtype)
        labels = []
        with self.bar(len(source), f"cache of block {number}, {split}") as bar:
            for x, target in source.batches(in_order(len(source), block.batch_size)):
                writer.append(x)
                labels.append(target)
                bar.update(len(target))
        named = self.storage.save(f"labels_{number}_{split}.pt", torch.cat(labels))
        return {"rows": writer.close(), "labels": named}


def cache_bytes(images: int, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Of a cache."""
    return images * torch.Size(shape).numel() * dtype.itemsize


def check_space(storage: Storage, needed: int) -> None:
    """Refuse to write what does not fit.

    Raises:
        ValueError: there is less space.
    """
    if needed > storage.free:
        raise ValueError(
            f"storage: {storage.folder} has {storage.free / MIB:.1f} MiB free, and caches take {needed / MIB:.1f} MiB. "
            'Use a folder with more space, cache_dtype=torch.float16, or cache="never".'
        )


def progress_bar(total: int, what: str, *, show: bool, initial: int = 0) -> Any:
    """On a terminal, if it is to be shown at all."""
    tqdm = require("tqdm", extra="local-learning").tqdm
    return tqdm(total=total, desc=what, initial=initial, leave=False, disable=None if show else True)

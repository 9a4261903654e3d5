"""The Controller: takes one block after the other through the Worker, and keeps what is done in the Storage."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from convbn_compile._extras import require
from convbn_compile.estimate import MIB
from convbn_compile.local_learning._choice import Costs, choose
from convbn_compile.local_learning._local import LocalUnit, Optimizer, resident_bytes
from convbn_compile.local_learning._source import Cache, Images, Source, Through
from convbn_compile.local_learning._state import State
from convbn_compile.local_learning.partitioner import Block, Plan
from convbn_compile.local_learning.storage import CacheWriter, Storage
from convbn_compile.local_learning.worker import Worker, in_order, rows
from convbn_compile.measure import allocated_peak

logger = logging.getLogger("convbn_compile.local_learning")

SPLITS = ("train", "val")
TIMED = 4
"""Batches by which the way to a block's input is timed."""


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


class Controller:
    """Of one run.

    Args:
        units: all, with their heads.
        shapes: of their outputs for one image.
        plan: the blocks.
        training: how.
        data: the images, for "train" and "val".
        storage: where all is kept.
        state: how far the run is.
        progress: show bars.
    """

    def __init__(
        self,
        units: Sequence[LocalUnit],
        shapes: Sequence[tuple[int, ...]],
        plan: Plan,
        training: Training,
        data: dict[str, Images],
        storage: Storage,
        state: State,
        *,
        progress: bool,
    ) -> None:
        self.units, self.shapes, self.plan, self.training = units, shapes, plan, training
        self.data, self.storage, self.state, self.progress = data, storage, state, progress

    def run(self) -> None:
        """Train what is left to train."""
        self._restore()
        blocks = self.plan.blocks
        with self._bar(len(blocks), "blocks", self.state.block) as bar:
            for number in range(self.state.block, len(blocks)):
                self._place(number)
                with self._timed():
                    if self.state.source is None:
                        self._choose(number)
                self._train(number)
                bar.update()
        self._place(None)

    def _restore(self) -> None:
        """Give the units the values that they had when the run was killed."""
        for unit, values in zip(self.units, self.storage.load(self.state.start), strict=True):
            unit.load_state_dict(values)
        for block, entry in zip(self.plan.blocks, self.state.finished, strict=False):
            for index, values in zip(block.units, self.storage.load(entry), strict=True):
                self.units[index].load_state_dict(values)
        if self.state.block or self.state.epoch:
            logger.info("going on at block %d after %d epochs", self.state.block, self.state.epoch)

    def _place(self, number: int | None) -> None:
        """The block that is trained on the device, and those that its input is computed by; all others on the CPU."""
        first = self._base() if number is not None else 0
        last = len(self.units) if number is None else self.plan.blocks[number].units.stop
        for index, unit in enumerate(self.units):
            there = number is None or self._unit_of(first) <= index < last
            unit.to(self.training.device if there else "cpu")

    def _base(self) -> int:
        """The number of the block whose input the data or the last cache are."""
        return self.state.cuts[-1] + 1 if self.state.cache else 0

    def _unit_of(self, number: int) -> int:
        return self.plan.blocks[number].first

    # --- where a block's input comes from ------------------------------------------------------------------------

    def _source(self, split: str, number: int) -> Source:
        """Of a block's input."""
        cache, base = self.state.cache, self._base()
        if cache is None:
            return self._through(self.data[split], base, number)
        return self._through(self._opened(split), base, number)

    def _opened(self, split: str) -> Source:
        """The cache, made again if it is damaged."""
        assert self.state.cache is not None
        entries = self.state.cache[split]
        if not all(map(self.storage.intact, entries.values())):
            logger.warning("the cache of %s is missing or damaged: it is made again", split)
            source, first = self.data[split], 0
            self._to_device(range(self._unit_of(self._base())))
            chain: Source = source
            for cut in self.state.cuts:
                chain = self._through(chain, first, cut + 1, rounded=True)
                first = cut + 1
            entries = self.state.cache[split] = self._written(split, self.state.cuts[-1], chain)
            self._commit()
        return Cache(self.storage.path(entries["rows"]["file"]), self.storage.load(entries["labels"]))

    def _to_device(self, indices: range) -> None:
        for index in indices:
            self.units[index].to(self.training.device)

    def _through(self, source: Source, first: int, number: int, *, rounded: bool = False) -> Source:
        """A source of the input of block `first` as one of the input of block `number`."""
        if first == number:
            return source
        blocks = self.plan.blocks[first:number]
        local = [self.units[index] for block in blocks for index in block.units]
        for unit in local:
            unit.eval()
        chunk = min(block.batch_size for block in blocks)
        dtype = self.training.cache_dtype if rounded else None
        return Through(source, tuple(unit.unit for unit in local), chunk, self.training.device, dtype)

    def _choose(self, number: int) -> None:
        """Decide it for a block, and write its cache."""
        how, why = self._choice(number)
        logger.info("block %d: its input is %s: %s", number, "cached" if how == "cache" else how, why)
        old = self.state.cache
        if how == "cache":
            cache = {split: self._written(split, number - 1, self._source(split, number)) for split in SPLITS}
            self.state.cuts.append(number - 1)
            self.state.cache = cache
        self.state.source = how
        self._commit()
        if how == "cache" and old is not None:
            self.storage.delete(entry for entries in old.values() for entry in entries.values())
        self._place(number)

    def _choice(self, number: int) -> tuple[str, str]:
        if self.training.cache == "never":
            return "recomputed", 'cache="never"'
        if self.training.cache == "always":
            return "cache", 'cache="always"'
        return choose(self._costs(number))

    def _costs(self, number: int) -> Costs:
        block = self.plan.blocks[number]
        source = self._source("train", number)
        indices = in_order(min(len(source), TIMED * block.batch_size), block.batch_size)
        began = time.perf_counter()
        images = sum(len(target) for _, target in source.batches(indices))
        seconds = (time.perf_counter() - began) / images
        rise = allocated_peak(lambda: [None for _ in source.batches(indices[:1])], self.training.device)
        before = [self.units[index] for index in range(self._unit_of(self._base()), block.first)]
        needed = block.predicted + sum(map(resident_bytes, before)) + rise
        shape = self.shapes[block.first - 1]
        return Costs(
            images=sum(map(len, self.data.values())),
            epochs=self.training.epochs,
            seconds=seconds,
            size=torch.Size(shape).numel() * self.training.cache_dtype.itemsize,
            speed=self.storage.speed(),
            free=self.storage.free,
            augments=self.data["train"].augments,
            fits=needed <= self.plan.memory_budget,
        )

    def _written(self, split: str, number: int, source: Source) -> dict[str, dict[str, str]]:
        """The outputs of a block, in a cache."""
        shape, batch = self.shapes[self.plan.blocks[number].units[-1]], self.plan.blocks[number].batch_size
        check_space(self.storage, cache_bytes(len(source), shape, self.training.cache_dtype))
        writer = CacheWriter(
            self.storage, f"cache_{number}_{split}.npy", (len(source), *shape), self.training.cache_dtype
        )
        labels = []
        with self._bar(len(source), f"cache of block {number}, {split}") as bar:
            for x, target in rows(source, batch):
                writer.append(x)
                labels.append(target)
                bar.update(len(target))
        named = self.storage.save(f"labels_{number}_{split}.pt", torch.cat(labels))
        return {"rows": writer.close(), "labels": named}

    # --- training ------------------------------------------------------------------------------------------------

    def _train(self, number: int) -> None:
        """A block, from where it is to its end."""
        block, state, training = self.plan.blocks[number], self.state, self.training
        source = self._source("train", number)
        batch = min(block.batch_size, len(source))
        units = [self.units[index] for index in block.units]
        worker = Worker(units, training.optimizer, batch, training.lr_batch_size, training.epochs)
        if state.checkpoint:
            worker.load(self.storage.load(state.checkpoint))
        for epoch in range(state.epoch, training.epochs):
            with self._timed(), self._bar(len(source) // batch, f"block {number}, epoch {epoch}") as bar:
                losses = worker.epoch(source, epoch, _seed(training.seed, number, epoch), bar.update)
            logger.info("block %d, epoch %d: losses %s", number, epoch, ", ".join(f"{loss:.4f}" for loss in losses))
            old, state.checkpoint = (
                state.checkpoint,
                self.storage.save(f"checkpoint_{number}_{epoch}.pt", worker.state()),
            )
            state.epoch = epoch + 1
            self._commit()
            self.storage.delete([old])
        self._finish(block, worker, number)

    def _finish(self, block: Block, worker: Worker, number: int) -> None:
        """Evaluate the block's exits, keep its values, and go on to the next."""
        state = self.state
        with self._timed():
            accuracies = worker.accuracies(self._source("val", number))
            values = [unit.state_dict() for unit in worker.units]
            state.finished.append(self.storage.save(f"block_{number}.pt", values))
        logger.info("block %d: accuracies %s", number, ", ".join(f"{one:.4f}" for one in accuracies))
        if worker.measured > self.plan.memory_budget:
            logger.warning(
                "block %d took %.2f MiB, above the budget of %.2f",
                number,
                worker.measured / MIB,
                self.plan.memory_budget / MIB,
            )
        state.accuracies += accuracies
        state.runs.append(
            {
                **asdict(block),
                "batch_size": worker.batch_size,
                "measured": worker.measured,
                "seconds": state.seconds,
                "source": state.source,
            }
        )
        old, state.checkpoint = state.checkpoint, None
        state.block, state.epoch, state.source, state.seconds = number + 1, 0, None, 0.0
        self._commit()
        self.storage.delete([old])

    def _commit(self) -> None:
        self.storage.commit(self.state.to_dict())

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.state.seconds += time.perf_counter() - began

    def _bar(self, total: int, what: str, initial: int = 0) -> Any:
        """A progress bar, on a terminal."""
        tqdm = require("tqdm", extra="local-learning").tqdm
        return tqdm(total=total, desc=what, initial=initial, leave=False, disable=None if self.progress else True)


def _seed(seed: int, block: int, epoch: int) -> int:
    """Of an epoch: the same whether or not the run was killed before."""
    return (seed * 1_000_003 + block * 1009 + epoch) % 2**63


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


def end_of(units: Sequence[LocalUnit], index: int) -> nn.Sequential:
    """The network that ends at a unit."""
    return units[index].exit_model(unit.unit for unit in units[:index])

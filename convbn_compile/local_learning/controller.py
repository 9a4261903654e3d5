"""The Controller: takes one block after the other through the Worker, and keeps what is done in the Storage."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from convbn_compile.estimate import MIB
from convbn_compile.local_learning._inputs import Inputs
from convbn_compile.local_learning._local import seeded
from convbn_compile.local_learning._network import Network
from convbn_compile.local_learning._offloading import Offloading, Values
from convbn_compile.local_learning._source import Images
from convbn_compile.local_learning._state import Entry, State
from convbn_compile.local_learning._training import Training, logger, progress_bar
from convbn_compile.local_learning.partitioner import Plan
from convbn_compile.local_learning.storage import SPLITS, Storage
from convbn_compile.local_learning.worker import Worker

TRAINING, EVALUATION = 0, 1
"""What random numbers are for."""


class Controller:
    """Of one run.

    Args:
        network: all units.
        plan: the blocks.
        training: how.
        data: the images, for "train" and "val".
        storage: where all is kept.
        state: how far the run is.
        progress: show bars.
    """

    def __init__(
        self,
        network: Network,
        plan: Plan,
        training: Training,
        data: Mapping[str, Images],
        storage: Storage,
        state: State,
        *,
        progress: bool,
    ) -> None:
        self.network, self.plan, self.training, self.storage, self.state = network, plan, training, storage, state
        self._bar = partial(progress_bar, show=progress)
        self.memory = Offloading(network.units, training.device, self._values)
        self.inputs = Inputs(network, plan, training, data, storage, state, self.memory, self._bar)

    def run(self) -> None:
        """Train what is left to train. All units are afterwards where the first was, whatever happens."""
        home = self.network.like.device
        for entry in (self.state.start, *self.state.finished):
            self.storage.load(entry, mapped=True)  # what cannot be read is an error before anything is freed
        try:
            self._run()
        finally:
            self._bring(home)

    def _bring(self, home: torch.device) -> None:
        """However often that is interrupted."""
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                self.memory.bring(home)
                break
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _values(self, number: int) -> Values:
        """Of a unit, when the last block ended."""
        for block, entry in zip(self.plan.blocks, self.state.finished, strict=False):
            if number in block.units:
                return self._read(entry, number - block.first)
        return self._read(self.state.start, number)

    def _read(self, entry: Entry, index: int) -> Values:
        values: Values = self.storage.load(entry, mapped=True)[index]
        return values

    def _run(self) -> None:
        blocks = self.plan.blocks
        with self._bar(len(blocks), "blocks", initial=self.state.block) as bar:
            for number in range(self.state.block, len(blocks)):
                if self.state.source is None:
                    with self._timed():
                        self.inputs.choose(number)
                    self.storage.commit(self.state.to_dict(), self.state.entries)
                with self._timed():
                    self.inputs.place(number)
                self._train(number)
                bar.update()

    def _train(self, number: int) -> None:
        """A block, from where it is to its end."""
        block, state, training = self.plan.blocks[number], self.state, self.training
        with self._timed():
            train, val = (self.inputs.of(split, number) for split in SPLITS)
        units = [self.network.units[index] for index in block.units]
        worker = Worker(units, training.optimizer, block.batch_size, training.lr_batch_size, training.epochs)
        if state.checkpoint:
            worker.load(self.storage.load(state.checkpoint))
        for epoch in range(state.epoch, training.epochs):
            with self._timed(), self._bar(len(train) // block.batch_size, f"block {number}, epoch {epoch}") as bar:
                losses = worker.epoch(train, epoch, (training.seed, number, epoch, TRAINING), bar.update)
            self._check_losses(number, losses)
            with self._timed(), seeded(training.device, training.seed, number, epoch, EVALUATION):
                accuracies = worker.accuracies(val)
            shown = [", ".join(f"{value:.4f}" for value in values) for values in (losses, accuracies)]
            logger.info("block %d, epoch %d: losses %s; accuracies %s", number, epoch, *shown)
            with self._timed():
                state.checkpoint = self.storage.save(f"checkpoint_{number}_{epoch}.pt", worker.state())
            done = {"block": number, "epoch": epoch, "seconds": state.total_seconds}
            state.history.append({**done, "losses": losses, "accuracies": accuracies})
            state.epoch = epoch + 1
            self.storage.commit(state.to_dict(), state.entries)
        self._finish(number, worker)

    def _check_losses(self, number: int, losses: Sequence[float]) -> None:
        for index, loss in zip(self.plan.blocks[number].units, losses, strict=True):
            if not math.isfinite(loss):
                name = self.network.units[index].name
                logger.warning("unit %s: its loss is %s. Use an optimizer with a lower learning rate.", name, loss)

    def _finish(self, number: int, worker: Worker) -> None:
        """Keep the block's values, and go on to the next."""
        state = self.state
        budget = self.plan.memory_budget
        if worker.measured > budget:
            took = worker.measured / MIB
            logger.warning("block %d took %.2f MiB, above the budget of %.2f", number, took, budget / MIB)
        with self._timed():
            state.finished.append(self.storage.save(f"block_{number}.pt", [unit.state_dict() for unit in worker.units]))
        run = {"batch_size": worker.batch_size, "measured": worker.measured, "seconds": state.seconds}
        state.runs.append({**run, "source": state.source})
        state.block, state.epoch, state.source, state.seconds = number + 1, 0, None, 0.0
        state.checkpoint = None
        if state.block == len(self.plan.blocks):
            state.cache = None
        self.storage.commit(state.to_dict(), state.entries)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.state.seconds += time.perf_counter() - began

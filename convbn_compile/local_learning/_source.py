"""Where a block's input comes from: the dataset, a cache on disk, or either of them through blocks that are done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from convbn_compile._arguments import shown
from convbn_compile.local_learning.storage import opened

Batch = tuple[Tensor, Tensor]
"""Images, or what a unit made of them, [b, ...], and their classes, int64 [b]; both on the CPU."""


class Source(Protocol):
    """Batches by the numbers of images."""

    def __len__(self) -> int: ...

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Batch]:
        """A batch for each of the given tensors of numbers, int64 [b]."""
        ...


@dataclass(frozen=True)
class Images:
    """A dataset.

    Attributes:
        dataset: of pairs of an image and its class.
        num_classes: how many there are.
    """

    dataset: Dataset[Any]
    num_classes: int

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Batch]:
        """Loaded by a DataLoader.

        Raises:
            ValueError: it is not a dataset of pairs, or a class is out of range.
        """
        own = torch.Generator()  # else a loader draws a number from that of everybody
        for batch in DataLoader(self.dataset, batch_sampler=[each.tolist() for each in indices], generator=own):
            yield self._checked(batch)

    def _checked(self, batch: Any) -> Batch:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(one, Tensor) for one in batch):
            raise ValueError(
                "The dataset has to be one of pairs: an image, as a tensor, and its class, as an int; "
                f"a batch of it is {type(batch).__name__} of {[type(one).__name__ for one in batch]}."
            )
        x, y = batch
        low, high = y.min().item(), y.max().item()
        if y.dim() != 1 or y.is_floating_point() or low < 0 or high >= self.num_classes:
            raise ValueError(
                f"Classes have to be integers from 0 to num_classes - 1 = {self.num_classes - 1}, one for each image, "
                f"got {low} to {high} in {y.dtype} of shape {list(y.shape)}."
            )
        return x, y.long()

    @property
    def augments(self) -> bool:
        """Whether an image is another one when it is read again."""
        with torch.random.fork_rng(devices=[]):
            first, second = (self.dataset[0][0] for _ in range(2))
        return not torch.equal(first, second)


@dataclass(frozen=True)
class Cache:
    """Rows on disk.

    Attributes:
        file: of the rows.
        labels: of all images, int64 [n].
        dtype: of the network.
    """

    file: Path
    labels: Tensor
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Batch]:
        """Read as they are asked for."""
        rows = opened(self.file)
        for each in indices:
            yield torch.from_numpy(rows[each.numpy()]).to(self.dtype), self.labels[each]


@dataclass(frozen=True)
class Through:
    """A source through units that are done, in eval mode and without a graph.

    Attributes:
        source: what they get.
        units: the modules.
        chunk: how many images go through them at a time.
        device: where the units are.
        rounded: the dtype of a cache that their output would be read from; None for none.
    """

    source: Source
    units: tuple[nn.Module, ...]
    chunk: int
    device: torch.device
    rounded: torch.dtype | None = None

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Batch]:
        """Computed as they are asked for."""
        for x, y in self.source.batches(indices):
            yield self.outputs(x), y

    @torch.no_grad()
    def outputs(self, x: Tensor) -> Tensor:
        """What the units make of a batch, on their device."""
        done = []
        for part in torch.split(x, self.chunk):
            value = part.to(self.device)
            for unit in self.units:
                value = unit(value)
            done.append(value.contiguous())
        whole = torch.cat(done) if len(done) > 1 else done[0]
        return whole if self.rounded is None else whole.to(self.rounded).to(whole.dtype)


def check_dataset(name: str, dataset: Any) -> None:
    """Refuse what has no length and no items.

    Raises:
        TypeError: it is no dataset with a length.
        ValueError: it is empty.
    """
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"{name}: a dataset with a length and items is needed, such as TensorDataset(images, labels), got "
            f"{shown(dataset)}."
        )
    if len(dataset) == 0:
        raise ValueError(f"{name}: the dataset is empty.")

"""Where a block's input comes from: the dataset, a cache on disk, or either of them through blocks that are done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from convbn_compile._arguments import shown
from convbn_compile.local_learning._local import resident_bytes

LOOKED_AT = 16
"""Images of a dataset by which augmentation is found, and by whose classes a run knows its data again."""

Batch = tuple[Tensor, Tensor]
"""Images, or what a unit on a device made of them, [b, ...], and their classes on the CPU, int64 [b]."""


class Source(Protocol):
    """Batches by the numbers of images."""

    def __len__(self) -> int: ...

    @property
    def resident(self) -> int:
        """Bytes that it needs on the device."""
        ...

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Batch]:
        """A batch for each of the given tensors of numbers, int64 [b]."""
        ...


@dataclass(frozen=True)
class Images:
    """A dataset.

    Attributes:
        name: "train" or "val".
        dataset: of pairs of an image and its class.
        num_classes: how many there are.
    """

    name: str
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
                f"{self.name}: the dataset has to be one of pairs: an image, as a tensor, and its class, as an int; "
                f"a batch of it is {type(batch).__name__} of {[type(one).__name__ for one in batch]}."
            )
        x, y = batch
        low, high = y.min().item(), y.max().item()
        if y.dim() != 1 or y.is_floating_point() or low < 0 or high >= self.num_classes:
            raise ValueError(
                f"{self.name}: classes have to be integers from 0 to num_classes - 1 = {self.num_classes - 1}, one for "
                f"each image, got {low} to {high} in {y.dtype} of shape {list(y.shape)}."
            )
        return x, y.long()

    @property
    def resident(self) -> int:
        """None on the device."""
        return 0

    def first(self, number: int) -> Tensor:
        """The first images, [n, ...]."""
        return self._head(number)[0]

    def labels(self, number: int) -> list[int]:
        """The first classes."""
        return [int(each) for each in self._head(number)[1]]

    def _head(self, number: int) -> Batch:
        try:
            return next(self.batches([torch.arange(min(number, len(self)))]))
        except (LookupError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{self.name}: the dataset has to be one of pairs that make a batch: an image, as a tensor of the same "
                f"shape as all others, and its class, as an int; loading the first of it: {type(error).__name__}: "
                f"{error}"
            ) from error

    @property
    def augments(self) -> bool:
        """Whether images are others when they are read again: some of them, twice, since a draw may repeat itself."""
        return not torch.equal(self.first(LOOKED_AT), self.first(LOOKED_AT))


@dataclass(frozen=True)
class Through:
    """A source through units that are done, in eval mode and without a graph.

    Attributes:
        source: what they get.
        units: the modules.
        chunk: how many images go through them at a time; fewer are filled up, so that it is the same kernels always.
        device: where the units are.
    """

    source: Source
    units: tuple[nn.Module, ...]
    chunk: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.source)

    @property
    def resident(self) -> int:
        """Bytes of the units on the device."""
        return self.source.resident + sum(map(resident_bytes, self.units))

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Batch]:
        """Computed as they are asked for."""
        for x, y in self.source.batches(indices):
            yield self._outputs(x), y

    @torch.no_grad()
    def _outputs(self, x: Tensor) -> Tensor:
        """What the units make of a batch, on their device."""
        whole: Tensor | None = None
        for start in range(0, len(x), self.chunk):
            part = self._output(x[start : start + self.chunk])
            if whole is None:
                whole = part.new_empty((len(x), *part.shape[1:]))
            whole[start : start + len(part)] = part
        assert whole is not None, "a batch has images"
        return whole

    def _output(self, x: Tensor) -> Tensor:
        """Of at most `chunk` images."""
        filling = x[:1].expand(self.chunk - len(x), *x.shape[1:])  # nothing that a cache might not hold
        value = torch.cat([x, filling]).to(self.device)
        for unit in self.units:
            value = unit.eval()(value)
        return value[: len(x)]


def check_dataset(name: str, dataset: Any) -> None:
    """Refuse what has no length and no items.

    Raises:
        TypeError: it is no dataset with a length.
        ValueError: it is empty.
    """
    iterable = isinstance(dataset, IterableDataset)
    if iterable or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"{name}: a dataset with a length and items is needed, such as TensorDataset(images, labels), got "
            f"{shown(dataset)}."
        )
    if len(dataset) == 0:
        raise ValueError(f"{name}: the dataset is empty.")

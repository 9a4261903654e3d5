"""A cache: the outputs of a block for every image, as rows of a file of NumPy that is memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convbn_compile._extras import require
from convbn_compile.local_learning.storage import Storage


class CacheWriter:
    """Writes the rows of a cache one batch after the other.

    Args:
        storage: where.
        name: of the file.
        shape: of the whole, [n, ...].
        dtype: float32 or float16.

    Raises:
        ValueError: there is no space for it.
    """

    def __init__(self, storage: Storage, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._storage, self._name, self._dtype = storage, name, dtype
        with storage.writing(name) as new:
            self._rows = _numpy().lib.format.open_memmap(new, "w+", str(dtype).removeprefix("torch."), shape)
            _allocate(new)
        self._filled = 0

    def append(self, rows: Tensor) -> None:
        """The next of them, [b, ...].

        Raises:
            ValueError: they are out of the range of the cache's dtype.
        """
        end = self._filled + len(rows)
        self._rows[self._filled : end] = _rounded(rows, self._dtype).cpu().numpy()
        self._filled = end

    def close(self) -> dict[str, str]:
        """Returns: what the manifest is to say of it."""
        assert self._filled == len(self._rows), f"{self._filled} of {len(self._rows)} rows of a cache were written"
        with self._storage.writing(self._name) as new:
            self._rows.flush()
            del self._rows
            return self._storage.keep(new, self._name)


class Rounding(nn.Module):
    """Values as a cache would hold them.

    Args:
        dtype: of the cache.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """What a cache of x is read as.

        Raises:
            ValueError: it is out of the range of the cache's dtype.
        """
        holds_all = torch.promote_types(x.dtype, self._dtype) == self._dtype
        return x if holds_all else _rounded(x, self._dtype).to(x.dtype)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    stored = x.to(dtype)
    if stored.isinf().any() and not x.isinf().any():
        raise ValueError(
            f"cache_dtype: a cache is to hold {x.abs().max().item():g}, which is beyond {dtype}. Begin again with a "
            'wider one in another folder, or with cache="never".'
        )
    return stored


@dataclass(frozen=True)
class Cache:
    """The rows of a cache as batches.

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

    @property
    def resident(self) -> int:
        """None on the device."""
        return 0

    def batches(self, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Read as they are asked for."""
        rows = opened(self.file)
        for each in indices:
            yield torch.from_numpy(rows[each.numpy()]).to(self.dtype), self.labels[each]


def opened(file: Path) -> Any:
    """The rows of a cache: an array of numpy that reads what is asked of it."""
    return _numpy().load(file, mmap_mode="r")


def cache_bytes(images: int, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Of a cache of so many images."""
    return images * torch.Size(shape).numel() * dtype.itemsize


def _allocate(file: Path) -> None:
    """Take the space now: a file that is memory-mapped and cannot grow kills the process."""
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)


def _numpy() -> Any:
    return require("numpy", extra="local-learning")

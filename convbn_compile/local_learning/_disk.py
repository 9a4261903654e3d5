"""A disk: how fast it is, and files that are on it and not in its buffers only."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

PROBE = 2**24
"""Bytes that the speed is measured with, at most."""


@dataclass(frozen=True)
class Speed:
    """Of a storage, in bytes a second."""

    write: float
    read: float


def speed_of(folder: Path, free: int) -> Speed:
    """As measured with a file that does not stay in memory, and takes half of the free bytes at most."""
    size = min(PROBE, free // 2)
    file, content = folder / "probe.new", os.urandom(size)
    began = time.perf_counter()
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    written = time.perf_counter()
    file.read_bytes()
    read = time.perf_counter()
    file.unlink()
    return Speed(size / (written - began), size / (read - written))


def checksum(file: Path) -> str:
    """SHA-256."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(2**20):
            found.update(part)
    return found.hexdigest()


def replace_file(new: Path, old: Path) -> None:
    """Put a file in place of another, on the disk and not in its buffers only."""
    with new.open("r+b") as stream:
        os.fsync(stream.fileno())
    new.replace(old)
    if os.name == "nt":  # where a folder cannot be opened
        return
    folder = os.open(old.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

"""Storage: what a run keeps in a folder, so that it can go on where it was killed.

    .lock              is locked while a run uses the folder
    manifest.json      what is done, and the checksum of every other file; replaced atomically, the last thing written
    start.pt           the units and heads before training
    checkpoint_*.pt    the block in training after its last epoch: values and optimizers
    block_*.pt         a finished block
    labels_*.pt        the classes that belong to a cache
    cache_*.npy        the outputs of a finished block for every image, in the order of the dataset, memory-mapped

A file counts once the manifest names it. Whatever it replaces is deleted afterwards, never before; so is what a run
that was killed left behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from convbn_compile._arguments import shown
from convbn_compile.estimate import MIB
from convbn_compile.local_learning._disk import checksum, replace_file

try:
    import fcntl
except ModuleNotFoundError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
SPLITS = ("train", "val")
OURS = re.compile(
    r"(start\.pt|checkpoint_\d+_\d+\.pt|block_\d+\.pt|(cache|labels)_\d+_(train|val)\.(npy|pt))(\.new)?|probe\.new"
)
"""Names of the files that the manifest has to name."""
OF_WRITING = re.compile("inline_container|PytorchStreamWriter|cannot be opened|Parent directory")
"""In the errors of torch.save for a file that cannot be written; it has no class for them."""


class Storage:
    """A folder.

    Args:
        folder: is made if there is none.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._used = False
        self._intact: dict[str, tuple[str, int, int]] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"storage: {shown(str(folder))} cannot be a folder: {error}") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """For one run at a time.

        Raises:
            ValueError: another run uses the folder.
        """
        self._used = self.path(".lock").exists()
        with self.path(".lock").open("a") as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    raise ValueError(
                        f"storage: another run uses {self.folder} now. Wait for its end, or use another folder."
                    ) from error
            yield

    def path(self, name: str) -> Path:
        """Of a file."""
        return self.folder / name

    def manifest(self) -> dict[str, Any] | None:
        """What was committed last; None in a new folder."""
        file = self.path(MANIFEST)
        if not file.exists():
            self._check_new()
            return None
        try:
            read = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(
                f"{file} is not a manifest of NeuroFlux: {error}. Use another folder as storage."
            ) from error
        if not isinstance(read, dict):
            raise ValueError(f"{file} is not a manifest of NeuroFlux. Use another folder as storage.")
        return read

    def commit(self, manifest: dict[str, Any], needed: Iterable[dict[str, Any]]) -> None:
        """Replace the manifest, so that either the old or the new one is there whatever happens; then tidy up.

        Args:
            manifest: the new one.
            needed: entries of the files that it names; others of ours are deleted.
        """
        with self.writing(MANIFEST) as new:
            new.write_text(json.dumps(manifest, indent=1))
            replace_file(new, self.path(MANIFEST))
        self.tidy(needed)

    def tidy(self, needed: Iterable[dict[str, Any]]) -> None:
        """Delete what a run, or one that was killed, left behind.

        Args:
            needed: entries of the files that are kept.
        """
        kept = {entry["file"] for entry in needed}
        for file in self._files():
            if file.name not in kept:
                file.unlink()

    def _files(self) -> list[Path]:
        return [file for file in self.folder.iterdir() if OURS.fullmatch(file.name)]

    def _check_new(self) -> None:
        """A run that was killed before its first manifest leaves its beginning at most; the rest is somebody's."""
        beginning = ("start.", "probe.") if self._used else ()
        theirs = sorted(file.name for file in self._files() if not file.name.startswith(beginning))
        if theirs:
            raise ValueError(
                f"storage: {self.folder} has {theirs[0]}, which a run would replace, and no {MANIFEST}. Use another "
                "folder."
            )

    def save(self, name: str, value: Any) -> dict[str, str]:
        """Write a file of tensors.

        Returns:
            What the manifest is to say of it.
        """
        with self.writing(name) as new:
            torch.save(value, new)
            return self.keep(new, name)

    def keep(self, new: Path, name: str) -> dict[str, str]:
        """Put what was written in its place.

        Returns:
            What the manifest is to say of it.
        """
        entry = {"file": name, "sha256": checksum(new)}
        replace_file(new, self.path(name))
        self._intact[name] = self._signature(entry)
        return entry

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """What becomes a file, and is deleted if it does not.

        Raises:
            ValueError: it cannot be written.
        """
        new = self.path(name + ".new")
        try:
            yield new
        except BaseException as error:
            with suppress(OSError):
                new.unlink(missing_ok=True)
            if not isinstance(error, OSError) and not OF_WRITING.search(str(error)):
                raise
            raise ValueError(
                f"storage: {name} cannot be written to {self.folder}: {error}. Call fit again with the same storage "
                "once it can be: a run goes on after the last epoch that was kept."
            ) from error

    def load(self, entry: dict[str, Any], *, mapped: bool = False) -> Any:
        """What save wrote, on the CPU.

        Args:
            entry: of the file.
            mapped: leave tensors in the file until they are read.

        Raises:
            ValueError: it is not there, or not what was written.
        """
        if not self.intact(entry):
            raise ValueError(
                f"{self.path(entry['file'])} is missing or damaged: its checksum is not that of the manifest. "
                "Training cannot go on from it; use a new folder as storage."
            )
        try:
            return torch.load(self.path(entry["file"]), map_location="cpu", weights_only=True, mmap=mapped)
        except UnpicklingError as error:
            raise ValueError(
                f"{self.path(entry['file'])} cannot be read as data: a state dict has to be of tensors, numbers and "
                f"text: {error}"
            ) from error

    def intact(self, entry: dict[str, Any]) -> bool:
        """Whether a file is what was written; it is read for that once, and again when it has changed."""
        file = self.path(entry["file"])
        if not file.is_file():
            return False
        now = self._signature(entry)
        if self._intact.get(entry["file"]) != now and checksum(file) == entry["sha256"]:
            self._intact[entry["file"]] = now
        return self._intact.get(entry["file"]) == now

    def _signature(self, entry: dict[str, Any]) -> tuple[str, int, int]:
        """By which a file is known again."""
        found = self.path(entry["file"]).stat()
        return entry["sha256"], found.st_mtime_ns, found.st_size

    @property
    def free(self) -> int:
        """Bytes."""
        return shutil.disk_usage(self.folder).free

    def check_space(self, needed: int) -> None:
        """Refuse to write what does not fit.

        Raises:
            ValueError: there is less space.
        """
        if needed > self.free:
            raise ValueError(
                f"storage: {self.folder} has {self.free / MIB:.1f} MiB free, and caches take {needed / MIB:.1f} MiB. "
                'Use a folder with more space, cache_dtype=torch.float16, or cache="never".'
            )

"""Files that commands write: looked at before anything is run, written when everything is printed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def add_file(parser: argparse.ArgumentParser, name: str, what: str, suffixes: Sequence[str]) -> None:
    """An argument for a file to write, in a folder that there is."""

    def parse(text: str) -> Path:
        file = Path(text)
        if file.suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"{text!r} does not end in {', '.join(suffixes)}")
        wrong = obstacle(file)
        if wrong:
            raise argparse.ArgumentTypeError(f"{text!r}: {wrong}. Name a file that can be written")
        return file

    parser.add_argument(name, type=parse, metavar="FILE", help=what)


def obstacle(file: Path) -> str:
    """Why a file cannot be written, as far as can be told without writing it; empty if it can."""
    if not file.parent.is_dir():
        return f"there is no folder {file.parent}"
    if file.is_dir():
        return "it is a folder"
    if file.exists():
        return "" if os.access(file, os.W_OK) else "it must not be written to"
    return "" if os.access(file.parent, os.W_OK | os.X_OK) else f"the folder {file.parent} must not be written to"


def written(file: Path | None, write: Callable[[Path], Any]) -> bool:
    """Write a file, if one was asked for. Why it was not written goes to stderr, and costs nothing else its output.

    Returns:
        False if the file could not be written; not if there was nothing to write, which `write` says by a ValueError.
    """
    if file is None:
        return True
    try:
        write(file)
    except (OSError, ValueError) as error:
        print(f"{file} was not written: {error}", file=sys.stderr)
        return not isinstance(error, OSError)
    return True

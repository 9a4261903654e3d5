"""Packages that only some parts need: imported where used, with an error that names the extra."""

from __future__ import annotations

import importlib
from typing import Any


def require(name: str, *, extra: str) -> Any:
    """Import a package of an extra.

    Args:
        name: of the module, such as "safetensors.torch".
        extra: of this distribution, such as "zoo", that installs it.

    Raises:
        ModuleNotFoundError: it, or a package that it needs, is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or name).partition(".")[0]
        message = f"This needs {missing}, which is not installed: pip install 'convbn-compile[{extra}]'"
        raise ModuleNotFoundError(message, name=missing) from error

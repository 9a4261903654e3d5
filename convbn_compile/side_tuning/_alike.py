"""Whether two models compute the same outside of what is trained, as far as their modules tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import nn

PLAIN = (int, float, str, bool, type(None), FunctionType, BuiltinFunctionType)
IGNORED = {*nn.Module().__dict__, "num_classes", "num_labels", "grad_checkpointing", "gradient_checkpointing"}
"""Attributes that change nothing of the values, or only the head's."""
MARKS = ("_compiled_", "_ddp_", "_fsdp_", "_is_")
"""What the names begin with of those that torch and transformers leave on modules."""


def difference(one: nn.Module, other: nn.Module, without: Sequence[str]) -> str | None:
    """The first that there is, in words; None if there is none.

    Compared are the classes of modules, what they print of themselves, and their attributes that are numbers, strings,
    functions or lists of those. Values of parameters and buffers are not.

    Args:
        one: a model.
        other: another.
        without: the paths of modules that do not count.
    """
    ours, theirs = (dict(_modules(model, without)) for model in (one, other))
    for path in {**ours, **theirs}:
        if path not in ours or path not in theirs:
            return f"only one of them has a module {path}"
        found, there = _traits(ours[path]), _traits(theirs[path])
        for name in {**found, **there}:
            if name not in found or name not in there or found[name] != there[name]:
                return f"{name} of {path or 'the model'} is {found.get(name)!r} and {there.get(name)!r}"
    return None


def _modules(model: nn.Module, without: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules(remove_duplicate=False):
        if not any(f"{path}.".startswith(f"{each}.") for each in without):
            yield path, module


def _traits(module: nn.Module) -> dict[str, Any]:
    plain = {name: value for name, value in module.__dict__.items() if _counts(name) and _is_plain(value)}
    return {
        "the class": f"{type(module).__module__}.{type(module).__qualname__}",
        "extra_repr()": module.extra_repr(),
        **plain,
    }


def _counts(name: str) -> bool:
    return name not in IGNORED and not name.startswith(MARKS)


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, (tuple, list)) else isinstance(value, PLAIN)

"""Checks of what a public function is given: what is wrong is said with the argument's name, before anything runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeVar

Value = TypeVar("Value")


def listed(
    name: str,
    values: Any,
    check: Callable[[Any], Value],
    *,
    example: str,
    optional: bool = True,
    key: Callable[[Value], Any] = lambda value: value,
) -> tuple[Value, ...]:
    """What `check` makes of each of the values of an argument that is a list.

    Args:
        name: of the argument.
        values: what was given.
        check: returns a value that is right, and raises TypeError or ValueError for any other.
        example: what may be written.
        optional: there may be none.
        key: what no two values may have in common.

    Raises:
        TypeError: `values` is no list or tuple, or one of them has the wrong type.
        ValueError: one of them is wrong, or there twice, or there is none.

    Examples:
        >>> listed("batches", [8, 0], count, example="[8, 32]")
        Traceback (most recent call last):
        ValueError: batches[1]: an integer of 1 or more is needed, got 0 (int).
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: a list such as {example} is needed, got {shown(values)}.")
    if not values and not optional:
        raise ValueError(f"{name}: there is none. Give {example}, or leave the argument out; got {shown(values)}.")
    found = tuple(located(f"{name}[{index}]", check, value) for index, value in enumerate(values))
    keys = [key(value) for value in found]
    twice = next((value for value, each in zip(values, keys, strict=True) if keys.count(each) > 1), None)
    if twice is not None:
        raise ValueError(f"{name}: {twice!r} is there twice. Leave one out, got {shown(values)}.")
    return found


def located(name: str, check: Callable[[Any], Value], value: Any) -> Value:
    """What `check` makes of a value; errors begin with the argument's name."""
    try:
        return check(value)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def count(value: Any) -> int:
    """An integer of 1 or more."""
    needed = f"an integer of 1 or more is needed, got {shown(value)}."
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(needed)
    if value < 1:
        raise ValueError(needed)
    return int(value)


UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def num_bytes(value: Any) -> int:
    """A number of bytes: an integer of 1 or more, or text such as "300MiB".

    Examples:
        >>> num_bytes("1.5 GiB")
        1610612736
    """
    if not isinstance(value, str):
        return count(value)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())
    bytes_each = UNITS.get(found[2]) if found else None
    if not found or not bytes_each or not 1 <= float(found[1]) * bytes_each < float("inf"):
        raise ValueError(f'a number of bytes is needed, such as 2**30, "300MiB" or "2GiB", got {shown(value)}.')
    return int(float(found[1]) * bytes_each)


def share(name: str, value: Any, below: float = 1.0) -> float:
    """A number of 0 or more, and below a limit.

    Raises:
        TypeError: it is no number.
        ValueError: it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {shown(value)}.")
    if not 0.0 <= value < below:
        limits = "0 or more, and finite" if below == float("inf") else f"from 0 to below {below:g}"
        raise ValueError(f"{name} must be {limits}, got {value!r}.")
    return float(value)


def one_of(name: str, value: Any, allowed: Sequence[Value]) -> Value:
    """One of some values.

    Raises:
        ValueError: it is none of them.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}.")
    return value  # type: ignore[no-any-return]


def named(value: Any) -> dict[str, Any]:
    """Keyword arguments; none for None."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"a dict by the names of the model's arguments is needed, got {shown(value)}.")
    return dict(value)


def shown(value: Any) -> str:
    """A value and its type, for a message."""
    return f"{value!r} ({type(value).__name__})"

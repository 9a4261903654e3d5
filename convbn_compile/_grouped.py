"""Lines of a table that differ in numbers only, put together: layer1.0.bn2, layer1.1.bn2 are layer*.*.bn2."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Item = TypeVar("Item")


def grouped(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """Items with the same key, in the order of their first."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def pattern(path: str, *, last: bool = False) -> str:
    """A module path with the numbers of its blocks as stars; its last name, such as bn2, stays unless `last`.

    >>> pattern("features.denseblock1.denselayer12.norm2")
    'features.denseblock*.denselayer*.norm2'
    >>> pattern("stages.0.3.conv_1x1.bn"), pattern("stages.0.3"), pattern("stages.0.3", last=True)
    ('stages.*.*.conv_1x1.bn', 'stages.*.3', 'stages.*.*')
    """
    names = path.split(".")
    kept = [] if last else [names.pop()]
    return ".".join([re.sub(r"^(\D*)\d+$", r"\1*", name) for name in names] + kept)


def without_numbers(text: str) -> str:
    """What sentences that differ in numbers only have in common."""
    return re.sub(r"\d+", "*", text)


def with_ranges(texts: Iterable[str]) -> str:
    """Sentences that differ in numbers only as one.

    >>> with_ranges(["8 times at 3 places", "12 times at 3 places", "9 times at 3 places"])
    '8 to 12 times at 3 places'
    """
    slots = zip(*(re.split(r"(\d+)", text) for text in texts), strict=True)
    return "".join(_range(slot) if index % 2 else slot[0] for index, slot in enumerate(slots))


def _range(numbers: Iterable[str]) -> str:
    ordered = sorted(numbers, key=int)
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"

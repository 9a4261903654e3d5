"""Lines of a table that differ in block numbers only, put together: layer1.0.bn2, layer1.1.bn2 are layer*.*.bn2."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Item = TypeVar("Item")


def grouped(
    items: Iterable[Item], path: Callable[[Item], str], alike: Callable[[Item], Hashable] = lambda _: None
) -> list[tuple[str, list[Item]]]:
    """Items whose module paths differ in block numbers only, in the order of their first.

    Args:
        items: what is put together.
        path: the module path of one.
        alike: what those put together must have in common, besides.

    Returns:
        For each group its pattern, or its only item's path, and the items.
    """
    groups: dict[tuple[str, Hashable], list[Item]] = {}
    for item in items:
        groups.setdefault((pattern(path(item)), alike(item)), []).append(item)
    return [(name if len(group) > 1 else path(group[0]), group) for (name, _), group in groups.items()]


def pattern(path: str) -> str:
    """A module path with its block numbers as stars; the last name, such as bn2, stays.

    >>> pattern("features.denseblock1.denselayer12.norm2")
    'features.denseblock*.denselayer*.norm2'
    """
    parents, dot, name = path.rpartition(".")
    return re.sub(r"\d+", "*", parents) + dot + name

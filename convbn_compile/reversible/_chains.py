"""Where a model has runs of blocks of one shape, and what they are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from convbn_compile._runs import Named, Run, joined
from convbn_compile.reversible._blocks import split, unknown
from convbn_compile.reversible._unit import Unit


@dataclass(frozen=True)
class Found(Run):
    """A run of blocks of one shape.

    Attributes:
        units: what the blocks are made of.
    """

    units: tuple[Unit, ...]


def find(model: nn.Module) -> list[Found]:
    """The runs of two known blocks or more that keep the shape."""
    return [
        Found(path, parent, tuple(name for name, _ in run), tuple(unit for _, units in run for unit in units))
        for path, parent in model.named_modules()
        for run in _runs(path, parent)
    ]


def _runs(path: str, parent: nn.Module) -> list[list[tuple[str, list[Unit]]]]:
    runs: list[list[tuple[str, list[Unit]]]] = [[]]
    children = parent._modules
    for name, child in children.items():
        once = sum(other is child for other in children.values()) == 1
        units = split(joined(path, name), child) if child is not None and once else None
        if units is None:
            runs.append([])
        else:
            runs[-1].append((name, units))
    return [run for run in runs if len(run) > 1]


def named(model: nn.Module, chains: Iterable[Any]) -> list[Found]:
    """The runs that the user named; a block of an unknown class is taken for x + F(x).

    Args:
        model: the model.
        chains: for each the path of a module whose children are its blocks, or the paths of the blocks.

    Raises:
        TypeError: a chain is neither.
        ValueError: there is no such module; blocks that are not children of one module, next to each other.
    """
    return [
        Found(run.path, run.parent, run.names, tuple(_units(run)))
        for run in Named(model, "make_reversible", "chains").runs(chains)
    ]


def _units(run: Run) -> Iterator[Unit]:
    for path, block in zip(run.paths, run.blocks, strict=True):
        yield from split(path, block) or unknown(path, block)

"""Where a model has runs of blocks of one shape, and how the model comes to run them as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from convbn_compile.reversible._blocks import residual, split
from convbn_compile.reversible._unit import Unit

LOOPS = {("torch.nn.modules.container", "Sequential.forward"), ("timm.models.regnet", "RegStage.forward")}
"""Forwards that call the children in turn and do nothing else."""


@dataclass(frozen=True)
class Found:
    """A run of blocks, the children of one module.

    Attributes:
        path: of the parent.
        parent: whose children they are.
        names: of the blocks among the children, in order.
        units: what they are made of.
    """

    path: str
    parent: nn.Module
    names: tuple[str, ...]
    units: tuple[Unit, ...]

    @property
    def paths(self) -> list[str]:
        """Of the blocks."""
        return [joined(self.path, name) for name in self.names]


def find(model: nn.Module) -> list[Found]:
    """The runs of two known blocks or more that keep the shape."""
    return [
        Found(path, parent, tuple(name for name, _ in run), tuple(unit for _, units in run for unit in units))
        for path, parent in model.named_modules()
        for run in _runs(path, parent)
    ]


def _runs(path: str, parent: nn.Module) -> list[list[tuple[str, list[Unit]]]]:
    runs: list[list[tuple[str, list[Unit]]]] = [[]]
    for name, child in parent.named_children():
        units = split(joined(path, name), child)
        if units is None:
            runs.append([])
        else:
            runs[-1].append((name, units))
    return [run for run in runs if len(run) > 1]


def named(model: nn.Module, chains: Iterable[Any]) -> list[Found]:
    """The runs that the user named.

    Args:
        model: the model.
        chains: for each the path of a module whose children are its blocks, or the paths of the blocks.

    Raises:
        TypeError: a chain is neither.
        ValueError: there is no such module; blocks that are not children of one module, next to each other.
    """
    found = [_named(model, chain) for chain in chains]
    blocks = [path for one in found for path in one.paths]
    twice = next((path for path in blocks if blocks.count(path) > 1), None)
    if twice is not None:
        raise ValueError(f"make_reversible: chains has {twice} twice. A block is in one chain.")
    return found


def _named(model: nn.Module, chain: Any) -> Found:
    if isinstance(chain, str):
        path, names = chain, tuple(name for name, _ in _module(model, chain).named_children())
    elif isinstance(chain, Sequence) and chain and all(isinstance(path, str) for path in chain):
        parents = {path.rpartition(".")[0] for path in chain}
        if len(parents) > 1:
            raise ValueError(f"make_reversible: blocks of a chain are children of one module, got {list(chain)!r}.")
        path, names = parents.pop(), tuple(path.rpartition(".")[2] for path in chain)
    else:
        raise TypeError(
            "make_reversible: chains is a list, for each chain the path of a module whose children are the blocks, "
            f'such as "layer3", or a list of the blocks\' paths; got {chain!r} ({type(chain).__name__}).'
        )
    parent = _module(model, path)
    blocks = [_module(model, joined(path, name)) for name in names]
    children = [name for name, _ in parent.named_children()]
    first = children.index(names[0]) if names else 0
    if not names or tuple(children[first : first + len(names)]) != names:
        raise ValueError(
            f"make_reversible: the blocks of a chain follow each other among the children of {path or 'the model'}, "
            f"which are {', '.join(children) or 'none'}; got {', '.join(names) or 'none'}."
        )
    units = [_units(joined(path, name), block) for name, block in zip(names, blocks, strict=True)]
    return Found(path, parent, names, tuple(unit for one in units for unit in one))


def _units(path: str, block: nn.Module) -> list[Unit]:
    """Of a known block as in the paper; any other is taken for x + F(x)."""
    return split(path, block) or residual(path, block)


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"make_reversible: the model has no module {path!r}.") from error


def joined(path: str, name: str) -> str:
    """The path of a child."""
    return f"{path}.{name}" if path else name


def runs_its_children(parent: nn.Module) -> bool:
    """True if all that its forward does is to call the children in turn."""
    forward: Callable[..., Any] = type(parent).forward
    return (forward.__module__, forward.__qualname__) in LOOPS

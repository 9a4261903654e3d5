"""Where a model has runs of blocks of one shape, and how the model comes to run them as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from convbn_compile.reversible._blocks import residual, split
from convbn_compile.reversible._unit import Unit


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
    """The runs that the user named.

    Args:
        model: the model.
        chains: for each the path of a module whose children are its blocks, or the paths of the blocks.

    Raises:
        TypeError: a chain is neither.
        ValueError: there is no such module; blocks that are not children of one module, next to each other.
    """
    if isinstance(chains, str) or not isinstance(chains, Iterable):
        raise TypeError(f'make_reversible: chains is a list, such as ["layer3"], got {chains!r}.')
    found = [_named(model, chain) for chain in chains]
    if not found:
        raise ValueError("make_reversible: chains is empty. None finds the blocks of known classes.")
    blocks = [path for one in found for path in one.paths]
    modules = [model.get_submodule(path) for path in blocks]
    for index, path in enumerate(blocks):
        if modules[index] in modules[:index]:
            raise ValueError(f"make_reversible: chains has {path} twice. A block is in one place of one chain.")
        outer = next((other for other in blocks if path.startswith(f"{other}.")), None)
        if outer is not None:
            raise ValueError(f"make_reversible: {path} is inside of {outer}, which is a block of a chain itself.")
    return found


def _named(model: nn.Module, chain: Any) -> Found:
    if isinstance(chain, str):
        path, names = chain, tuple(_module(model, chain)._modules)
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
    children = list(parent._modules)
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

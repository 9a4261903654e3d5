"""The blocks of a network in order, and their stages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import nn

from convbn_compile._runs import Named, Run, check_untouched
from convbn_compile.reversible._blocks import SPLITS, split
from convbn_compile.reversible._blocks import is_known as has_units

KEEPING_SHAPE = {
    ("timm.models.beit", "Block"),
    ("timm.models.eva", "EvaBlock"),
    ("timm.models.swin_transformer_v2", "SwinTransformerV2Block"),
    ("timm.models.vision_transformer", "ParallelScalingBlock"),
    ("timm.models.vision_transformer", "ResPostBlock"),
    ("torchvision.models.swin_transformer", "SwinTransformerBlockV2"),
}
"""Classes of blocks that keep the shape of what they get, which has its channels last, beside those of Dr²Net."""


@dataclass(frozen=True)
class Block:
    """One b_i.

    Attributes:
        index: i.
        path: of the module.
        module: the block.
        stage: the number of its stage: blocks of one shape in a row, after at most one that makes this shape.
        keeps_shape: False for the one that makes it, which is not tapped.
    """

    index: int
    path: str
    module: nn.Module
    stage: int
    keeps_shape: bool


def blocks_of(model: nn.Module, given: Iterable[Any] | None) -> list[Block]:
    """All of them: those of known classes, or those that the user named.

    Raises:
        TypeError: `given` is no list of paths.
        ValueError: there is none; a block has hooks, or a forward of its own.
    """
    runs = list(_known(model)) if given is None else Named(model, "attach", "blocks").runs(given)
    if not runs:
        raise ValueError(
            f"attach found no blocks of a known class in {type(model).__module__}.{type(model).__qualname__}. Known "
            f"are {', '.join(sorted(map('.'.join, {*SPLITS, *KEEPING_SHAPE})))}; for others name the modules whose "
            'children they are: blocks=["blocks"].'
        )
    found: list[Block] = []
    seen: dict[nn.Module, str] = {}
    stage = -1
    for run in runs:
        for path, module in zip(run.paths, run.blocks, strict=True):
            check_untouched(
                path,
                module,
                "which would get what blocks hand on, no tensor. Remove them before, or leave the block out by blocks.",
            )
            if seen.setdefault(module, path) != path:
                raise ValueError(f"attach: {path} is the same module as {seen[module]}. Leave it out by blocks.")
            keeps_shape = not has_units(module) or split(path, module) is not None
            stage += path == run.paths[0] or not keeps_shape
            found.append(Block(len(found), path, module, stage, keeps_shape))
    return found


def is_known(module: nn.Module | None) -> bool:
    """Whether it is a block of a class that need not be named."""
    return has_units(module) or is_kept(module)


def is_kept(module: nn.Module | None) -> bool:
    """Whether it is of a class that KEEPING_SHAPE has."""
    return (type(module).__module__, type(module).__qualname__) in KEEPING_SHAPE


def _known(model: nn.Module) -> Iterator[Run]:
    for path, parent in model.named_modules():
        for known, children in groupby(parent._modules.items(), lambda item: is_known(item[1])):
            if known:
                yield Run(path, parent, tuple(name for name, _ in children))

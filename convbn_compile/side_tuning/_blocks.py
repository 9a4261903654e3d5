"""The blocks of a network in order: their stages, how wide they are, and which are tapped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

from convbn_compile._runs import Named, Run, check_untouched
from convbn_compile.reversible._blocks import is_known, split
from convbn_compile.side_tuning._tap import Width


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
            f"attach found no residual blocks in {type(model).__name__}. Known are those of ResNets, RegNets, "
            "ConvNeXt, ViT and Swin of torchvision and timm; for others name the modules whose children they are: "
            'blocks=["blocks"].'
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
            keeps_shape = not is_known(module) or split(path, module) is not None
            stage += path == run.paths[0] or not keeps_shape
            found.append(Block(len(found), path, module, stage, keeps_shape))
    return found


def _known(model: nn.Module) -> Iterator[Run]:
    for path, parent in model.named_modules():
        for known, children in groupby(parent._modules.items(), lambda item: is_known(item[1])):
            if known:
                yield Run(path, parent, tuple(name for name, _ in children))


def first_adapted(blocks: Sequence[Block], start: int) -> int:
    """The number of the block from which on outputs are adapted.

    Args:
        blocks: all.
        start: M.

    Raises:
        ValueError: M is out of range, or no block from M on keeps its shape.
    """
    if not 0 <= start < len(blocks):
        raise ValueError(
            f'start must be "middle" or from 0 to {len(blocks) - 1}, of {len(blocks)} blocks, got {start}.'
        )
    for block in blocks[start:]:
        if block.keeps_shape:
            return block.index
    raise ValueError(
        f"No block from start = {start} on keeps the shape of its input ({blocks[start].path} and after), so that "
        "nothing would be adapted. Use a smaller start."
    )


def widths(blocks: Sequence[Block], start: int) -> list[Width]:
    """Of the blocks that are tapped: those whose h reaches an adapted block of their stage.

    Raises:
        ValueError: as first_adapted; or a block begins with no layer that tells how wide it is.
    """
    adapted = first_adapted(blocks, start)
    stages = {block.stage for block in blocks[adapted:] if block.keeps_shape}
    return [_width(block) for block in blocks if block.keeps_shape and block.stage in stages]


def check_rank(rank: int, blocks: Sequence[Block], tapped: Sequence[Width]) -> None:
    """See to it that taps are of low rank.

    Args:
        rank: d'.
        blocks: all.
        tapped: of those that are.

    Raises:
        ValueError: they are not.
    """
    for width in tapped:
        if rank >= width.channels:
            raise ValueError(
                f"rank must be below the width of what is tapped, and {blocks[width.block].path} has "
                f"{width.channels} channels, got {rank}."
            )


def _like(module: nn.Module) -> tuple[torch.dtype | None, torch.device | None]:
    """Dtype and device of what computes in a block, since norms may be in float32 where the rest is not."""
    layers = [each for each in module.modules() if isinstance(each, (nn.Linear, nn.Conv2d))]
    for parameter in (parameter for each in (*layers, module) for parameter in each.parameters()):
        if parameter.is_floating_point():
            return parameter.dtype, parameter.device
    return None, None


def _width(block: Block) -> Width:
    like = _like(block.module)
    for module in block.module.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            channels = module.in_channels if isinstance(module, nn.Conv2d) else module.num_features
            return Width(block.index, block.stage, channels, 1, *like)
        if isinstance(module, nn.Linear):
            return Width(block.index, block.stage, module.in_features, -1, *like)
        if isinstance(module, nn.LayerNorm):
            of_images = "2d" in type(module).__name__  # timm's and torchvision's LayerNorm2d, channels in dimension 1
            return Width(block.index, block.stage, module.normalized_shape[-1], 1 if of_images else -1, *like)
    raise ValueError(
        f"attach: {block.path} ({type(block.module).__name__}) has to begin with a Conv2d, BatchNorm2d, Linear or "
        "LayerNorm, which tells how many channels it gets and where they are."
    )

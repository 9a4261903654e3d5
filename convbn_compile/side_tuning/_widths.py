"""Which blocks are tapped, and how wide they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from convbn_compile.side_tuning._blocks import Block, is_kept
from convbn_compile.side_tuning._tap import Width


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
    width = getattr(block.module, "dim", None)
    if is_kept(block.module) and isinstance(width, int):
        return Width(block.index, block.stage, width, -1, *like)
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

"""The table that a handle prints: stages, taps, what is adapted, parameters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from tabulate import tabulate

from convbn_compile.side_tuning._blocks import Block
from convbn_compile.side_tuning._side_network import SideNetwork


def table(blocks: Sequence[Block], side: SideNetwork) -> str:
    """A line for each stage.

    Args:
        blocks: all.
        side: what taps them.
    """
    rows = []
    for _, members in groupby(blocks, lambda block: block.stage):
        stage = list(members)
        parts = [part for part in (side.at(block.index) for block in stage) if part is not None]
        modules = {*(part.tap for part in parts), *(part.conv for part in parts if part.conv is not None)}
        numbers = sum(parameter.numel() for module in modules for parameter in module.parameters())
        adapted = sum(part.adapts for part in parts)
        rows.append([f"{stage[0].path} to {stage[-1].path}", len(stage), len(parts), adapted, f"{numbers:,}"])
    return tabulate(rows, headers=("stage", "blocks", "tapped", "adapted", "parameters"))

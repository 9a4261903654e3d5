"""The report of a run that is done: its exits, the chosen one, and what that is beside the whole network."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from convbn_compile.local_learning._network import Network
from convbn_compile.local_learning._state import State
from convbn_compile.local_learning.partitioner import Plan
from convbn_compile.local_learning.report import BlockRun, Exit, Report

INFERENCE_BATCH = 32
"""The largest batch that inference is timed with."""


def chosen_exit(exits: Sequence[Exit], tolerance: float) -> Exit:
    """The earliest whose accuracy is at most `tolerance` below the best.

    Args:
        exits: in order.
        tolerance: a share of images.
    """
    best = max(each.accuracy for each in exits)
    return next(each for each in exits if each.accuracy >= best - tolerance)


def reported(network: Network, state: State, plan: Plan, tolerance: float) -> Report:
    """Of a run that is done, whose network is in eval mode afterwards.

    Args:
        network: trained.
        state: at the end.
        plan: the blocks.
        tolerance: of the chosen exit.
    """
    ends = [network.until(index).eval() for index in range(len(network.units))]
    sizes = [sum(parameter.numel() for parameter in end.parameters()) for end in ends]
    rows = zip(network.units, state.accuracies, sizes, strict=True)
    exits = tuple(Exit(index, unit.name, accuracy, size) for index, (unit, accuracy, size) in enumerate(rows))
    chosen = chosen_exit(exits, tolerance)
    ratio = state.inference[-1] / state.inference[chosen.unit]
    runs = zip(plan.blocks, state.runs, strict=True)
    blocks = tuple(BlockRun(names=block.names, predicted=block.predicted, **run) for block, run in runs)
    return Report(plan.memory_budget, blocks, exits, tuple(state.history), chosen, sizes[-1], ratio)


def inference_seconds(network: Network, batch: int, device: torch.device) -> list[float]:
    """Of a batch up to each exit, as the sum of its units', of which one at a time is on the device.

    Args:
        network: on any device, which it is on afterwards too.
        batch: the batch size.
        device: where time is measured.
    """
    units, found = 0.0, []
    shapes = [network.input_shape, *network.shapes]
    dtype = next(network.units[0].parameters()).dtype
    for local, both in zip(network.units, pairwise(shapes), strict=True):
        given, made = (torch.zeros(batch, *shape, dtype=dtype, device=device) for shape in both)
        units += _seconds(local.unit, given)
        found.append(units + _seconds(local.head, made))
    return found


@torch.no_grad()
def _seconds(module: nn.Module, x: Tensor) -> float:
    """Of a call in eval mode, the fastest of five."""
    found, tensors = [], (*module.parameters(), *module.buffers())
    home = tensors[0].device if tensors else x.device
    try:
        module.eval().to(x.device)
        for _ in range(5):
            began = time.perf_counter()
            module(x).sum().item()
            found.append(time.perf_counter() - began)
    finally:
        module.to(home)
    return min(found)

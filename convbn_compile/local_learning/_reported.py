"""The report of a run that is done: its exits, the chosen one, and what that is beside the whole network."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from convbn_compile.local_learning._local import resident_bytes
from convbn_compile.local_learning._network import Network
from convbn_compile.local_learning._state import State
from convbn_compile.local_learning.partitioner import Plan
from convbn_compile.local_learning.report import BlockRun, Exit, Report

THROUGHPUT_BATCH, TURNS = 32, 5
"""The largest batch that is timed, and how often; the fastest counts."""


def chosen_exit(exits: Sequence[Exit], tolerance: float) -> Exit:
    """The earliest whose accuracy is at most `tolerance` below the best.

    Args:
        exits: in order.
        tolerance: a share of images.
    """
    best = max(each.accuracy for each in exits)
    return next(each for each in exits if each.accuracy >= best - tolerance)


def reported(network: Network, state: State, plan: Plan, tolerance: float, device: torch.device) -> Report:
    """Of a run that is done, whose network is in eval mode afterwards.

    Args:
        network: trained.
        state: at the end; it gets the chosen exit's throughput if it has not.
        plan: the blocks.
        tolerance: of the chosen exit.
        device: where images a second are measured, if the whole network fits into the budget; else where it is.
    """
    ends = [network.until(index).eval() for index in range(len(network.units))]
    sizes = [sum(parameter.numel() for parameter in end.parameters()) for end in ends]
    rows = zip(network.units, state.accuracies, sizes, strict=True)
    exits = tuple(Exit(index, unit.name, accuracy, size) for index, (unit, accuracy, size) in enumerate(rows))
    chosen, like = chosen_exit(exits, tolerance), network.like
    if str(chosen.unit) not in state.throughput:
        where = device if resident_bytes(ends[-1]) <= plan.memory_budget else like.device
        batch = min(THROUGHPUT_BATCH, plan.least_batch)
        images = torch.zeros(batch, *network.input_shape, dtype=like.dtype, device=where)
        last = chosen.unit == len(ends) - 1
        state.throughput[str(chosen.unit)] = 1.0 if last else _times_faster(ends[chosen.unit], ends[-1], images)
    runs = zip(plan.blocks, state.runs, strict=True)
    blocks = tuple(BlockRun(names=block.names, predicted=block.predicted, **run) for block, run in runs)
    throughput = state.throughput[str(chosen.unit)]
    return Report(plan.memory_budget, blocks, exits, tuple(state.history), chosen, sizes[-1], throughput)


def _times_faster(exit_: nn.Module, whole: nn.Module, images: Tensor) -> float:
    """Seconds of the whole network over those of an exit, in turns; both are on the images' device meanwhile."""
    home = next(whole.parameters()).device
    try:
        found = [[_seconds(model.to(images.device), images) for model in (exit_, whole)] for _ in range(TURNS)]
    finally:
        exit_.to(home)
        whole.to(home)
    shorter, longer = (min(pair[side] for pair in found) for side in (0, 1))
    return longer / shorter


def _seconds(model: nn.Module, images: Tensor) -> float:
    """Of a call."""
    began = time.perf_counter()
    with torch.no_grad():
        model(images).sum().item()
    return time.perf_counter() - began

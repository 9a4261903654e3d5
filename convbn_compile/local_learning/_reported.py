"""The report of a run that is done: its exits, the chosen one, and what that is beside the whole network."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from convbn_compile.local_learning._network import Network
from convbn_compile.local_learning._state import State
from convbn_compile.local_learning.partitioner import Plan
from convbn_compile.local_learning.report import BlockRun, Exit, Report

THROUGHPUT_BATCH = 32


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
        state: at the end.
        plan: the blocks.
        tolerance: of the chosen exit.
        device: where images a second are measured; the network stays where it is.
    """
    ends = [network.until(index).eval() for index in range(len(network.units))]
    sizes = [sum(parameter.numel() for parameter in end.parameters()) for end in ends]
    rows = zip(network.units, state.accuracies, sizes, strict=True)
    exits = tuple(Exit(index, unit.name, accuracy, size) for index, (unit, accuracy, size) in enumerate(rows))
    chosen = chosen_exit(exits, tolerance)
    like = next(network.units[0].parameters())
    batch = min(THROUGHPUT_BATCH, plan.least_batch)
    images = torch.zeros(batch, *network.input_shape, dtype=like.dtype, device=device)
    shorter = chosen.unit < len(ends) - 1
    ratio = _seconds(ends[-1], images) / _seconds(ends[chosen.unit], images) if shorter else 1.0
    runs = zip(plan.blocks, state.runs, strict=True)
    blocks = tuple(BlockRun(names=block.names, predicted=block.predicted, **run) for block, run in runs)
    return Report(plan.memory_budget, blocks, exits, tuple(state.history), chosen, sizes[-1], ratio)


@torch.no_grad()
def _seconds(model: nn.Module, images: Tensor) -> float:
    """Of a call, the fastest of five; the model is on the images' device meanwhile."""
    found, home = [], next(model.parameters()).device
    try:
        model.to(images.device)
        for _ in range(5):
            began = time.perf_counter()
            model(images).sum().item()
            found.append(time.perf_counter() - began)
    finally:
        model.to(home)
    return min(found)

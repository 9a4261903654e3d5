"""The Profiler: what a step of each unit takes, by batch size, as a line.

    m_l(b) = p_l + q_l b                          least squares over batch sizes 2, 4, 8 and the largest that may fit

m_l is the peak of a real step of unit l with its head, its loss, gradients and optimizer: bytes that are resident
(parameters, buffers, the optimizer's state, the batch) and what the step allocates beyond them at its peak, which on
CUDA is told by the allocator (max_memory_allocated), and elsewhere counted from the allocator's events. Either has what
a convolution needs inside of itself, which for the weights of late layers is more than what is saved for backward.
Source: the linear model of memory of NeuroFlux (arXiv 2402.14139).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from convbn_compile.local_learning._lines import UnitProfile, fitted
from convbn_compile.local_learning._local import LocalUnit, Optimizer, keeping_modes, optimizer_of, resident_bytes
from convbn_compile.measure import allocated_peak

BATCH_SIZES = (2, 4, 8)


@contextmanager
def steps_of(
    local: LocalUnit, shape: Sequence[int], optimizer: Optimizer, device: torch.device
) -> Iterator[tuple[torch.optim.Optimizer, Callable[[int], int]]]:
    """Run real steps of a unit to measure them. Its values, mode and device are afterwards what they were.

    Args:
        local: the unit.
        shape: of its input for one image.
        optimizer: of its parameters.
        device: to run on.

    Yields:
        The optimizer, and a function from a batch size to the bytes of a step.
    """
    like = next(local.parameters())
    before, home = copy.deepcopy(local.state_dict()), like.device
    trains = optimizer_of(local.to(device), optimizer)

    def bytes_at(batch: int) -> int:
        x = torch.randn(batch, *shape, device=device, dtype=like.dtype)
        target = torch.zeros(batch, dtype=torch.int64, device=device)
        resident = resident_bytes(local, trains) + x.nbytes + target.nbytes
        return resident + allocated_peak(lambda: local.step(x, target, trains), device)

    try:
        with keeping_modes(local):
            local.train()
            bytes_at(BATCH_SIZES[0])  # compiles, and makes the optimizer's state
            yield trains, bytes_at
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"unit {local.name}: a step of training fails: {error}") from error
    finally:
        local.to(home).load_state_dict(before)


def profiled(
    local: LocalUnit,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    optimizer: Optimizer,
    device: torch.device,
    budget: float,
    limit: int,
) -> UnitProfile:
    """Of one unit.

    Args:
        local: the unit.
        shapes: of its input and of its output, for one image.
        optimizer: of its parameters.
        device: that it is to be trained on.
        budget: bytes that the largest batch may take.
        limit: the largest batch.

    Raises:
        ValueError: a step fails.
    """
    with steps_of(local, shapes[0], optimizer, device) as (trains, bytes_at):
        first = UnitProfile(
            name=local.name,
            shape=shapes[1],
            input_bytes=torch.Size(shapes[0]).numel() * next(local.parameters()).element_size(),
            parameters=sum(parameter.numel() for parameter in local.parameters()),
            resident=resident_bytes(local, trains),
            points=tuple((batch, bytes_at(batch)) for batch in BATCH_SIZES),
        )
        return _extended(fitted(first), bytes_at, budget, limit)


def _extended(profile: UnitProfile, bytes_at: Callable[[int], int], budget: float, limit: int) -> UnitProfile:
    """With a point at the largest batch that may fit, and one between where there is no line."""
    largest = int(min(profile.largest(budget), limit))
    if largest <= BATCH_SIZES[-1]:
        return profile
    profile = fitted(replace(profile, points=(*profile.points, (largest, bytes_at(largest)))))
    between = (BATCH_SIZES[-1] + largest) // 2
    if profile.linear or between <= BATCH_SIZES[-1]:
        return profile
    points = sorted([*profile.points, (between, bytes_at(between))])
    return fitted(replace(profile, points=tuple(points)))

"""Plans that are checked: a step of each unit is run with its block's batch before the plan counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from convbn_compile import _torch
from convbn_compile.local_learning._lines import Profile, UnitProfile, checked
from convbn_compile.local_learning._local import Optimizer, seeded
from convbn_compile.local_learning._network import Network
from convbn_compile.local_learning._training import logger
from convbn_compile.local_learning.partitioner import Partitioner, Plan
from convbn_compile.local_learning.profiler import steps_of

CHECKS = 4
"""How often a plan is made at most because a step took more than its line."""


@contextmanager
def measuring(device: torch.device, seed: int) -> Iterator[None]:
    """For steps of many units with random images, which leave nobody's random numbers changed."""
    with seeded(device, seed), _torch.unlimited_compiles():
        yield


def planned(
    partitioner: Partitioner, network: Network, profile: Profile, optimizer: Optimizer, device: torch.device, seed: int
) -> Plan:
    """A plan by the lines of a profile, with lines raised until no step takes more than its line.

    Raises:
        ValueError: a unit does not fit with a single image, or a step fails.
    """
    plan, units = partitioner.plan(profile.units), profile.units
    for _ in range(CHECKS):
        with measuring(device, seed):
            found = _checked(plan, network, units, optimizer, device)
        if all(old.margin == new.margin for old, new in zip(units, found, strict=True)):
            return plan
        plan, units = partitioner.plan(found), found
    logger.warning("steps took more than their lines %d times: the batches of the last plan were not tried", CHECKS)
    return plan


def _checked(
    plan: Plan, network: Network, units: Sequence[UnitProfile], optimizer: Optimizer, device: torch.device
) -> tuple[UnitProfile, ...]:
    """The lines with points at the batches of a plan."""
    batches = [block.batch_size for block in plan.blocks for _ in block.units]
    inputs, found = [network.input_shape, *network.shapes[:-1]], []
    for local, shape, unit, batch in zip(network.units, inputs, units, batches, strict=True):
        if batch in dict(unit.points):
            found.append(unit)
            continue
        with steps_of(local, shape, optimizer, device) as (_, bytes_at):
            found.append(checked(unit, batch, bytes_at(batch)))
    return tuple(found)

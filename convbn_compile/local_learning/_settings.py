"""What a run that goes on must have in common with the one that began."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from convbn_compile.local_learning._local import optimizer_of
from convbn_compile.local_learning._network import Network
from convbn_compile.local_learning._source import LOOKED_AT, Images

GIVEN = (
    "head_filters",
    "num_classes",
    "memory_budget",
    "batch_size_limit",
    "similarity",
    "margin",
    "cache",
    "cache_dtype",
    "lr_batch_size",
    "seed",
)
"""Arguments of NeuroFlux."""


def run_settings(given: Mapping[str, Any], network: Network, epochs: int, data: Mapping[str, Images]) -> dict[str, Any]:
    """As JSON takes them.

    Args:
        given: arguments of NeuroFlux, by name.
        network: its units.
        epochs: of each block.
        data: the images, for "train" and "val".
    """
    values = {name: given[name] for name in GIVEN}
    return {
        "units": [[unit.name, *(list(one.shape) for one in unit.parameters())] for unit in network.units],
        "image": list(network.input_shape),
        "dtype": str(network.like.dtype),
        **{name: str(value) if isinstance(value, torch.dtype) else value for name, value in values.items()},
        "layers": [" ".join(str(unit).split()) for unit in network.units],
        "options": str(sorted(given["options"].items())),
        "optimizer": _optimizer(optimizer_of(network.units[0], given["optimizer"])),
        "epochs": epochs,
        "images": [len(one) for one in data.values()],
        "labels": [one.labels(LOOKED_AT) for one in data.values()],
    }


def _optimizer(optimizer: torch.optim.Optimizer) -> str:
    """Its class and the settings of its groups."""
    groups = [{**group, "params": len(group["params"])} for group in optimizer.param_groups]
    return f"{type(optimizer).__name__} {groups}"

"""What is kept of a side-tuned network: its tensors, and what they were trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from convbn_compile._arguments import shown

DIFFERENT = {
    "settings": ("with other settings", "Call attach with those."),
    "blocks": ("on other blocks", "Load it into a network of the same architecture, and attach it to the same blocks."),
    "backbone": (
        "on another backbone",
        "Load the weights, in the dtype, that it was trained on; a classifier does not count.",
    ),
}
"""Of each part of a state what is wrong if it differs, and what to do."""


def load(state: Any, own: Mapping[str, Any]) -> None:
    """Copy the tensors of a state into one's own, which has the same names and shapes.

    Raises:
        ValueError: it is no state of a side-tuned network, or one of another.
    """
    if not isinstance(state, Mapping) or state.keys() != own.keys() or not _are_tensors(state["tensors"]):
        given = sorted(map(str, state)) if isinstance(state, Mapping) else shown(state)
        raise ValueError(f"The state of a side-tuned network has {sorted(own)}, tensors by their names, got {given}.")
    for what, (trained, remedy) in DIFFERENT.items():
        if state[what] != own[what]:
            raise ValueError(
                f"The side network was trained {trained}: {what} {state[what]!r}, here {own[what]!r}. {remedy}"
            )
    tensors = state["tensors"]
    shapes, wanted = ({name: tuple(each.shape) for name, each in one.items()} for one in (tensors, own["tensors"]))
    for name in {**wanted, **shapes}:
        if shapes.get(name) != wanted.get(name):
            raise ValueError(f"{name}: a tensor of shape {wanted.get(name)} is needed, got {shapes.get(name)}.")
    with torch.no_grad():
        for name, tensor in own["tensors"].items():
            tensor.copy_(tensors[name])


def _are_tensors(given: Any) -> bool:
    return isinstance(given, Mapping) and all(isinstance(each, Tensor) for each in given.values())

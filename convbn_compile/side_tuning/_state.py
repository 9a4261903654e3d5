"""What is kept of a side-tuned network: its tensors, and what they were trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    """Copy the tensors of a state into one's own, which has the same names and shapes: all of them or none.

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
    for name in {**own["tensors"], **tensors}:
        _check(name, tensors.get(name), own["tensors"].get(name))
    with torch.no_grad():
        for name, tensor in own["tensors"].items():
            tensor.copy_(tensors[name])


def check_tensors(tensors: Iterable[str]) -> None:
    """Of a state that is to be kept.

    Args:
        tensors: their names.

    Raises:
        ValueError: one is of get_extra_state(), which load_state_dict would not know what to do with.
    """
    for name in tensors:
        if name.endswith("_extra_state"):
            raise ValueError(f"{name} is no parameter or buffer of the head, and is not kept. Leave it out of head.")


def _check(name: str, given: Tensor | None, own: Tensor | None) -> None:
    """Nothing is copied before all can be."""
    if own is None:
        raise ValueError(f"{name}: there is no such tensor here.")
    if given is None or given.shape != own.shape:
        found = None if given is None else tuple(given.shape)
        raise ValueError(f"{name}: a tensor of shape {tuple(own.shape)} is needed, got {found}.")
    if given.is_meta:
        raise ValueError(f"{name}: the tensor is on the meta device, without values.")
    if given.is_floating_point() != own.is_floating_point() or given.is_complex() != own.is_complex():
        raise ValueError(f"{name}: a tensor of {own.dtype} is needed, got {given.dtype}.")


def _are_tensors(given: Any) -> bool:
    return isinstance(given, Mapping) and all(isinstance(each, Tensor) for each in given.values())

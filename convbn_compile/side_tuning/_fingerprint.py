"""A fingerprint of the values of a network, by which a state is known to be of the same."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def fingerprint(model: nn.Module, without: Sequence[str]) -> str:
    """SHA-256 of the names and values of all parameters and buffers of a floating dtype that its state_dict has.

    Args:
        model: the model.
        without: the paths of modules that do not count.

    Raises:
        ValueError: a tensor has no values that could be read.
    """
    prefixes = tuple(f"{path}." for path in without)
    found, kept = hashlib.sha256(), model.state_dict().keys()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        if tensor.is_floating_point() and name in kept and not name.startswith(prefixes):
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            _add(found, name, tensor.detach())
    return found.hexdigest()


def _add(found: hashlib._Hash, name: str, tensor: Any) -> None:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # of a DTensor
    if type(whole) is not Tensor or whole.is_meta:
        raise ValueError(
            f"The fingerprint of the backbone needs the values of {name}, which is a {type(whole).__name__} on "
            f"{whole.device}. Load the weights first."
        )
    there = whole.cpu().contiguous()
    size = there.numel() * there.element_size()
    if size:
        found.update((ctypes.c_char * size).from_address(there.data_ptr()))

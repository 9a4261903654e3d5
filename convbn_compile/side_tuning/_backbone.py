"""What of a model is the frozen backbone: its head, its fingerprint, and how it is frozen and let go of."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from convbn_compile import _torch
from convbn_compile.modes import hold_batch_norms, let_go_of_batch_norms
from convbn_compile.side_tuning._blocks import Block

SIDE = "side_network"
"""The name of the side network among the children of a model."""


def head_of(model: Any, blocks: Sequence[Block], given: str | Iterable[str] | None) -> list[str]:
    """The paths of the head's modules, which is trained: those that were given, or of the classifier.

    That is what timm's get_classifier returns, and in other models the last linear layer behind the blocks; none of a
    model without.

    Raises:
        TypeError: `given` is no path.
        ValueError: there is no such module.
    """
    if given is not None:
        return _checked_head(model, [given] if isinstance(given, str) else given)
    paths = {module: path for path, module in model.named_modules()}
    if hasattr(model, "get_classifier"):
        classifier = model.get_classifier()
        modules = classifier if isinstance(classifier, (tuple, list)) else [classifier]
        return [paths[module] for module in modules if module in paths and any(True for _ in module.parameters())]
    names = list(paths.values())
    behind = names[names.index(blocks[-1].path) + 1 :]
    inside = tuple(f"{block.path}." for block in blocks)
    linear = [path for path in behind if isinstance(model.get_submodule(path), nn.Linear)]
    return [path for path in linear if not path.startswith(inside)][-1:]


def _checked_head(model: nn.Module, given: Iterable[Any]) -> list[str]:
    paths = list(given)
    for path in paths:
        if not isinstance(path, str):
            raise TypeError(f"head is the path of a module, or a list of paths, got {path!r} ({type(path).__name__}).")
        try:
            model.get_submodule(path)
        except AttributeError as error:
            raise ValueError(f"head: the model has no module {path!r}.") from error
    return paths


class Frozen:
    """A model of which only some modules are trained, and whose other batch norms stay in eval mode through train().

    Args:
        model: the model.
        trained: the paths of the modules.
    """

    def __init__(self, model: nn.Module, trained: Sequence[str]) -> None:
        inside = {module for path in trained for module in model.get_submodule(path).modules()}
        kept = {id(parameter) for module in inside for parameter in module.parameters()}
        norms = (module for module in model.modules() if isinstance(module, _torch.BatchNormModule))
        self.norms = [norm for norm in norms if norm.running_mean is not None and norm not in inside]
        self.before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        for parameter, _ in self.before:
            parameter.requires_grad = id(parameter) in kept
        hold_batch_norms(self.norms)

    def release(self) -> None:
        """All is as it was."""
        for parameter, required in self.before:
            parameter.requires_grad = required
        let_go_of_batch_norms(self.norms)


def fingerprint(model: nn.Module, without: Sequence[str]) -> str:
    """SHA-256 of the names and values of all parameters and buffers of a floating dtype.

    Args:
        model: the model.
        without: the paths of modules that do not count.
    """
    prefixes = tuple(f"{path}." for path in without)
    found = hashlib.sha256()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        if tensor.is_floating_point() and not name.startswith(prefixes):
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            _add(found, tensor.detach().cpu().contiguous())
    return found.hexdigest()


def _add(found: hashlib._Hash, tensor: Tensor) -> None:
    size = tensor.numel() * tensor.element_size()
    if size:
        found.update((ctypes.c_char * size).from_address(tensor.data_ptr()))

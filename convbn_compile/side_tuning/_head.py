"""The head of a model, which is trained with the side network."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from convbn_compile._arguments import shown
from convbn_compile.side_tuning._blocks import Block


def head_of(model: Any, blocks: Sequence[Block], given: str | Iterable[str] | None) -> list[str]:
    """The paths of the head's modules: those that were given, or of the classifier.

    Warns if there is none, or if another linear layer stands beside it. The classifier is what timm's get_classifier
    returns, and in other models the last linear layer that is outside of the blocks, one behind them before one that is
    not.

    Raises:
        TypeError: `given` is no path.
        ValueError: there is no such module.
    """
    if given is not None:
        return _named(model, given)
    found = _classifier(model) if hasattr(model, "get_classifier") else _last_linear(model, blocks)
    if not found:
        warnings.warn(
            f"attach found no head in {type(model).__name__}, so that nothing but the side network is trained. Name it "
            "by head=, or pass head=[] for none.",
            stacklevel=3,
        )
    beside = _beside(model, blocks, found)
    if beside:
        warnings.warn(
            f"attach takes {', '.join(found)} for the head, and freezes {', '.join(beside)} beside it. Name all that "
            "is to be trained by head=.",
            stacklevel=3,
        )
    return found


def _beside(model: nn.Module, blocks: Sequence[Block], head: Sequence[str]) -> list[str]:
    """The other linear layers of the parent of the head that are behind the blocks."""
    parents = {path.rpartition(".")[0] for path in head}
    return [
        path
        for path in _linear(model, blocks)
        if path in _behind(model, blocks) and path not in head and path.rpartition(".")[0] in parents
    ]


def _classifier(model: Any) -> list[str]:
    paths = {module: path for path, module in model.named_modules()}
    classifier = model.get_classifier()
    modules = classifier if isinstance(classifier, (tuple, list)) else [classifier]
    return [paths[module] for module in modules if module in paths and any(True for _ in module.parameters())]


def _last_linear(model: nn.Module, blocks: Sequence[Block]) -> list[str]:
    outside, behind = _linear(model, blocks), _behind(model, blocks)
    return [path for path in outside if path in behind][-1:] or outside[-1:]


def _linear(model: nn.Module, blocks: Sequence[Block]) -> list[str]:
    """Outside of the blocks."""
    inside = tuple(f"{block.path}." for block in blocks)
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [path for path in linear if not f"{path}.".startswith(inside)]


def _behind(model: nn.Module, blocks: Sequence[Block]) -> list[str]:
    names = [path for path, _ in model.named_modules()]
    return names[names.index(blocks[-1].path) :]


def _named(model: nn.Module, given: Any) -> list[str]:
    if not isinstance(given, Iterable):
        raise TypeError(f"head is the path of a module, or a list of paths, got {shown(given)}.")
    paths = [given] if isinstance(given, str) else list(given)
    for path in paths:
        if not isinstance(path, str):
            raise TypeError(f"head is the path of a module, or a list of paths, got {shown(path)}.")
        if not path:
            raise ValueError("head: '' is the whole model. Name a module in it, or pass head=[] for none.")
        try:
            model.get_submodule(path)
        except AttributeError as error:
            raise ValueError(f"head: the model has no module {path!r}.") from error
    return paths


def check_head(model: nn.Module, head: Sequence[str], frozen: Sequence[Block]) -> None:
    """See to it that the head can be trained, and nothing of it is of the frozen backbone.

    Args:
        model: the model.
        head: the paths of its modules.
        frozen: the blocks that run without a graph.

    Raises:
        ValueError: a parameter of the head is of integers; a module of it is inside of one of those, or has one inside;
            it shares a parameter.
    """
    prefixes = tuple(f"{path}." for path in head)
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes) and not (parameter.is_floating_point() or parameter.is_complex()):
            raise ValueError(f"head: {name} is {parameter.dtype}, and cannot be trained. Leave it out of head.")
    for block in frozen:
        for path in head:
            if f"{block.path}.".startswith(f"{path}.") or path.startswith(f"{block.path}."):
                raise ValueError(f"head: {path} is trained, but {block.path} is frozen and runs without a graph.")
    named = list(model.named_parameters(remove_duplicate=False))
    trained = {id(parameter): name for name, parameter in named if name.startswith(prefixes)}
    for name, parameter in named:
        if id(parameter) in trained and not name.startswith(prefixes):
            raise ValueError(
                f"head: {trained[id(parameter)]} is {name} of the backbone, too, which is frozen. Untie them, or leave "
                "it out of head."
            )

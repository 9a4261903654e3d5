"""What the public functions take for a model, and the module that is meant where a model comes wrapped."""

from __future__ import annotations

from typing import Any

from torch import nn

from convbn_compile import _torch


def check_module(model: Any, caller: str) -> None:
    """See to it that `model` is a module of Python code.

    Raises:
        TypeError: it is no module, or one of TorchScript, whose code nobody here can see.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller} needs a torch.nn.Module, got {model!r} ({type(model).__name__}).")
    inside = unwrapped(model)
    if _torch.is_script(inside):
        raise TypeError(
            f"{caller} does not support TorchScript modules, got a {type(inside).__name__}: "
            "pass the module that torch.jit.script or torch.jit.trace was called on."
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DistributedDataParallel, or both; any other module itself."""
    inside = getattr(_torch.inside_ddp(model), "_orig_mod", _torch.inside_ddp(model))
    return model if inside is model else unwrapped(inside)

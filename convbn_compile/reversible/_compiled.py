"""Blocks through torch.compile: those that are alike share their graphs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from convbn_compile.reversible._unit import G, Unit


def compile_units(units: Sequence[Unit], **kwargs: Any) -> None:
    """Let each unit compute what torch.compile(**kwargs) makes of it."""
    alike: dict[Any, Any] = {}
    for unit in units:
        kind = (unit.g, str(unit.module))
        if kind not in alike:
            alike[kind] = torch.compile(_apart(len(alike)), **kwargs)
        unit.compiled = partial(alike[kind], unit.g)


def _block(g: G, module: nn.Module, x: Tensor, alpha: Tensor) -> Tensor:
    return g(module, x, alpha)


def _apart(number: int) -> FunctionType:
    """The function with code of its own: Dynamo's limit of recompiles, which is for each code, counts no other's."""
    code = _block.__code__.replace(co_name=f"block_{number}")
    return FunctionType(code, _block.__globals__, code.co_name)

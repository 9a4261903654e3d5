"""A run of blocks whose inputs backward rebuilds from its outputs: the autograd.Function of Dr²Net."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from convbn_compile.reversible import coupling
from convbn_compile.reversible._replay import Autocast, RandomState, statistics_stay
from convbn_compile.reversible._unit import Unit


@dataclass(frozen=True)
class Coefficients:
    """alpha and beta: as numbers, and alpha as a tensor, whose value is no constant of compiled code."""

    alpha: float
    beta: float
    alpha_tensor: Tensor

    @classmethod
    def of(cls, alpha: float, beta: float) -> Coefficients:
        """Of two numbers."""
        return cls(alpha, beta, torch.tensor(alpha, dtype=torch.float64))


def run(units: Sequence[Unit], streams: coupling.Streams, coefficients: Coefficients) -> coupling.Streams:
    """The streams after the units, under ordinary autograd."""
    x, y = streams
    for unit in units:
        x, y = coupling.forward(unit(x, coefficients.alpha_tensor), x, y, coefficients.beta)
    return x, y


def run_reversible(units: Sequence[Unit], streams: coupling.Streams, coefficients: Coefficients) -> coupling.Streams:
    """Likewise; saved for backward are the last streams only."""
    parameters = [parameter for unit in units for parameter in unit.trained()]
    apply: Any = _Segment.apply
    x, y = apply(tuple(units), coefficients, *streams, *parameters)
    return x, y


class _Segment(torch.autograd.Function):
    """Parameters are arguments, so that their gradients go the way of all others: hooks, DDP, frozen stems."""

    @staticmethod
    def forward(ctx: Any, units: tuple[Unit, ...], coefficients: Coefficients, *tensors: Tensor) -> coupling.Streams:
        x, y = (stream.detach() for stream in tensors[:2])  # compiled blocks tell what requires grad from what does not
        ctx.units, ctx.coefficients = units, coefficients
        ctx.autocast, ctx.random = Autocast.now(x.device.type), []
        for unit in units:
            ctx.random.append(RandomState.now(x.device))
            x, y = coupling.forward(unit.checked(x, coefficients.alpha_tensor), x, y, coefficients.beta)
        ctx.save_for_backward(x, y)
        return x, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        beta = ctx.coefficients.beta
        gradients: list[Tensor | None] = []
        for unit, random in zip(reversed(ctx.units), reversed(ctx.random), strict=True):
            before = coupling.input_of(y, beta).requires_grad_()
            with torch.enable_grad(), random.again(), ctx.autocast.again(), statistics_stay(unit.module):
                g = unit(before, ctx.coefficients.alpha_tensor)
            trained = unit.trained()
            own = torch.autograd.grad(g, (before, *trained), grad_x.to(g.dtype), allow_unused=True)
            gradients[:0] = own[1:]
            x, y = before.detach(), coupling.second_of(x, g.detach())
            grad_x, grad_y = _total(own[0], beta * grad_y), grad_x
        return (None, None, grad_x, grad_y, *gradients)


def _total(gradient: Tensor | None, other: Tensor) -> Tensor:
    return other if gradient is None else gradient + other

"""A run of blocks whose inputs backward rebuilds from its outputs: the autograd.Function of Dr²Net."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from convbn_compile.reversible import coupling
from convbn_compile.reversible._replay import Autocast, RandomState, State
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
        return cls(alpha, beta, torch.tensor(alpha, dtype=torch.float64, device="cpu"))


def run(units: Sequence[Unit], streams: coupling.Streams, coefficients: Coefficients) -> coupling.Streams:
    """The streams after the units, under ordinary autograd."""
    x, y = streams
    for unit in units:
        x, y = coupling.forward(unit.checked(x, coefficients.alpha_tensor), x, y, coefficients.beta)
    return x, y


def run_reversible(units: Sequence[Unit], streams: coupling.Streams, coefficients: Coefficients) -> coupling.Streams:
    """Likewise; saved for backward are the last streams only, and the parameters, which are there anyway."""
    runs = [Run(unit, State.now(unit.module)) for unit in units]
    parameters = dict.fromkeys(tensor for each in runs for tensor in each.state.parameters.values())
    apply: Any = _Segment.apply
    x, y = apply(tuple(runs), coefficients, *streams, *parameters)
    return x, y


class Run:
    """One run of a unit, with what there was before.

    Args:
        unit: which.
        state: of its module, before.
    """

    def __init__(self, unit: Unit, state: State) -> None:
        self.unit, self.state = unit, state
        self.random: RandomState | None = None

    def first(self, x: Tensor, alpha: Tensor) -> Tensor:
        """G(x), if it can be computed again.

        Raises:
            ValueError: as Unit.checked; or the block writes to a buffer that is no running statistic.
        """
        self.random = RandomState.now(x.device)
        found = self.unit.checked(x, alpha)
        written = self.state.written()
        if written is not None:
            raise ValueError(
                f"make_reversible: {self.unit.path} writes to its buffer {written} in forward, which backward would do "
                "a second time. Leave it out of the chain."
            )
        return found

    def second(self, x: Tensor, alpha: Tensor, tensors: dict[Tensor, Tensor]) -> Tensor:
        """The same once more, of `tensors` in place of the parameters."""
        assert self.random is not None, "a second run follows a first"
        with self.random.again(), self.state.again(tensors):
            return self.unit(x, alpha)


class _Segment(torch.autograd.Function):
    """Parameters are arguments, so that their gradients go the way of all others: hooks, DDP, frozen stems.

    They are saved, too, so that autograd sees what is written to before backward. That differentiates by copies, which
    share their memory, for hooks would run once more otherwise.
    """

    @staticmethod
    def forward(ctx: Any, runs: tuple[Run, ...], coefficients: Coefficients, *tensors: Tensor) -> coupling.Streams:
        x, y = (stream.detach() for stream in tensors[:2])  # compiled blocks tell what requires grad from what does not
        ctx.runs, ctx.coefficients, ctx.autocast = runs, coefficients, Autocast.now(x.device.type)
        for each in runs:
            x, y = coupling.forward(each.first(x, coefficients.alpha_tensor), x, y, coefficients.beta)
        ctx.parameters = tensors[2:]
        ctx.save_for_backward(x, y, *ctx.parameters)
        return x, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *saved = ctx.saved_tensors
        beta, alpha = ctx.coefficients.beta, ctx.coefficients.alpha_tensor
        wanted = dict(zip(ctx.parameters, ctx.needs_input_grad[4:], strict=True))
        pairs = zip(ctx.parameters, saved, strict=True)
        copies: dict[Tensor, Tensor] = {one: nn.Parameter(now.detach(), wanted[one]) for one, now in pairs}
        total: dict[Tensor, Tensor | None] = dict.fromkeys(ctx.parameters)
        for each in reversed(ctx.runs):
            before = coupling.input_of(y, beta).requires_grad_()
            with torch.enable_grad(), ctx.autocast.again():
                g = each.second(before, alpha, copies)
            own = [tensor for tensor in dict.fromkeys(each.state.parameters.values()) if wanted[tensor]]
            found = torch.autograd.grad(
                g, (before, *(copies[tensor] for tensor in own)), grad_x.to(g.dtype), allow_unused=True
            )
            for tensor, gradient in zip(own, found[1:], strict=True):
                total[tensor] = _sum(total[tensor], gradient)
            x, y = before.detach(), coupling.second_of(x, g.detach())
            grad_x, grad_y = _sum(found[0], beta * grad_y), grad_x
        return (None, None, grad_x, grad_y, *total.values())


def _sum(one: Any, other: Any) -> Any:
    """Of two gradients, of which one may be missing."""
    return other if one is None else one if other is None else one + other

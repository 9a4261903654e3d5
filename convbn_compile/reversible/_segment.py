"""A run of blocks whose inputs backward rebuilds from its outputs: the autograd.Function of Dr²Net."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
    """Likewise; saved for backward are two tensors, or one of a single unit, and parameters, which are there anyway."""
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

    def second(self, x: Tensor, alpha: Tensor, tensors: Mapping[Tensor, Tensor]) -> Tensor:
        """The same once more, of `tensors` in place of the parameters.

        Raises:
            RuntimeError: a buffer was written to since; or something is trained that is no parameter of the block.
        """
        assert self.random is not None, "a second run follows a first"
        written = self.state.written()
        if written is not None:
            raise RuntimeError(
                f"The buffer {written} of {self.unit.path}, a block of a reversible chain, was written to between "
                "forward and backward, which computes the block again."
            )
        with self.random.again(), self.state.again(tensors), torch.enable_grad():
            found = self.unit(x, alpha)
        if not self.unit.is_known_to_be_closed:
            self._check_closed(found, {x, *tensors.values()})
        return found

    def _check_closed(self, found: Tensor, known: set[Tensor]) -> None:
        if any(leaf.requires_grad and leaf not in known for leaf in leaves(found)):
            raise RuntimeError(
                f"{self.unit.path}, a block of a reversible chain, reads something that requires grad and is no "
                "parameter of it: its gradient would be lost. Make it a parameter of the block, or leave the block "
                "out of the chain; torch.nn.utils.parametrize.cached() must not be around a reversible network."
            )
        self.unit.is_known_to_be_closed = True


class _Segment(torch.autograd.Function):
    """Saved are the input of the last unit, of which its second stream is made, and, if there are more, its output.

    Parameters are arguments, so that their gradients go the way of all others: hooks, DDP, frozen stems. They are
    saved, too, so that autograd sees what is written to before backward. That differentiates by copies of those which
    are trained, which share their memory, for hooks would run once more otherwise.
    """

    @staticmethod
    def forward(ctx: Any, runs: tuple[Run, ...], coefficients: Coefficients, *tensors: Tensor) -> coupling.Streams:
        x, y = (stream.detach() for stream in tensors[:2])  # compiled blocks tell what requires grad from what does not
        ctx.runs, ctx.coefficients, ctx.autocast = runs, coefficients, Autocast.now(x.device.type)
        last = x
        for each in runs:
            last = x
            x, y = coupling.forward(each.first(x, coefficients.alpha_tensor), x, y, coefficients.beta)
        ctx.parameters = tensors[2:]
        ctx.save_for_backward(last, x if len(runs) > 1 else None, *ctx.parameters)
        return x, y

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "A reversible chain has no second derivative, which create_graph=True asks for: restore() gives the "
                "original model back."
            )
        before, after, *saved = ctx.saved_tensors
        beta, alpha = ctx.coefficients.beta, ctx.coefficients.alpha_tensor
        wanted = dict(zip(ctx.parameters, ctx.needs_input_grad[4:], strict=True))
        pairs = zip(ctx.parameters, saved, strict=True)
        copies: dict[Tensor, Tensor] = {one: nn.Parameter(now.detach()) if wanted[one] else one for one, now in pairs}
        total: dict[Tensor, Tensor | None] = dict.fromkeys(ctx.parameters)
        for each in reversed(ctx.runs):
            before = before.detach().requires_grad_()
            with ctx.autocast.again():
                g = each.second(before, alpha, copies)
            own = [tensor for tensor in dict.fromkeys(each.state.parameters.values()) if wanted[tensor]]
            found = torch.autograd.grad(
                g, (before, *(copies[tensor] for tensor in own)), grad_x.to(g.dtype), allow_unused=True
            )
            for tensor, gradient in zip(own, found[1:], strict=True):
                total[tensor] = _sum(total[tensor], gradient)
            grad_x, grad_y = _sum(found[0], beta * grad_y), grad_x
            if each is not ctx.runs[0]:
                before, after = coupling.input_of(coupling.second_of(after, g.detach()), beta), before.detach()
        return (None, None, grad_x, grad_y, *total.values())


def leaves(tensor: Tensor) -> Iterator[Tensor]:
    """What a tensor was computed of that gradients are added up in."""
    seen, rest = set(), [tensor.grad_fn]
    while rest:
        node = rest.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        rest += [function for function, _ in node.next_functions]


def _sum(one: Any, other: Any) -> Any:
    """Of two gradients, of which one may be missing."""
    return other if one is None else one if other is None else one + other

"""One chain of a reversible network: in segments under autograd, as a plain loop without."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from convbn_compile.reversible import coupling
from convbn_compile.reversible._replay import Autocast
from convbn_compile.reversible._segment import Coefficients, run, run_reversible
from convbn_compile.reversible._unit import Unit

Method = TypeVar("Method", bound=Callable[..., Any])


def _uncompiled(method: Method) -> Method:
    """What Dynamo does not look into: the blocks are compiled one by one."""
    disable: Callable[[Method], Method] = torch.compiler.disable
    return disable(method)


class Settings(Protocol):
    """What the chains of a network have in common."""

    coefficients: Coefficients
    ordinary: bool

    def lengths(self, chain: Chain, dtype: torch.dtype, *, low_precision: bool) -> Sequence[int]:
        """Of the segments."""


class Chain:
    """What stands in the place of a run of blocks.

    Args:
        units: what the blocks are made of.
        paths: of the blocks.
        settings: of the network.
    """

    def __init__(self, units: Sequence[Unit], paths: Sequence[str], settings: Settings) -> None:
        self.units, self.paths, self.settings = tuple(units), tuple(paths), settings

    @property
    def rectified(self) -> bool:
        """True if a block ends in an activation with a kink, behind which errors jump."""
        return any(unit.rectified for unit in self.units)

    @_uncompiled
    def __call__(self, x: Tensor) -> Tensor:
        """What the last block returns for x, in the dtype of x; the streams are float32 at least under autocast.

        Raises:
            ValueError: backward is asked for at beta = 0.
        """
        coefficients, autocast = self.settings.coefficients, Autocast.now(x.device.type).dtype is not None
        wide = x.to(torch.promote_types(x.dtype, torch.float32)) if autocast else x
        streams = self._run(coupling.start(wide, coefficients.beta), low_precision=autocast)
        return coupling.end(*streams, coefficients.beta).to(x.dtype)

    def _run(self, streams: coupling.Streams, *, low_precision: bool) -> coupling.Streams:
        coefficients = self.settings.coefficients
        if not self._needs_backward(streams[0]) or self.settings.ordinary:
            return run(self.units, streams, coefficients)
        if coefficients.beta == 0:
            raise ValueError(
                f"The reversible chain from {self.paths[0]} to {self.paths[-1]} has beta = 0, with which backward "
                "cannot rebuild its activations: set(alpha, beta) with a beta above 0, such as 0.125, or run it under "
                "torch.no_grad()."
            )
        rest = iter(self.units)
        for length in self.settings.lengths(self, streams[0].dtype, low_precision=low_precision):
            streams = run_reversible(tuple(itertools.islice(rest, length)), streams, coefficients)
        return streams

    def _needs_backward(self, x: Tensor) -> bool:
        parameters = (parameter for unit in self.units for parameter in unit.module.parameters())
        return torch.is_grad_enabled() and (x.requires_grad or any(parameter.requires_grad for parameter in parameters))

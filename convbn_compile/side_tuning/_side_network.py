"""The Compact Side Network: low-rank taps of a frozen network, their running sum, and what of it goes back.

    w_i      = a_i c_i                        of rank d', without a bias
    h_{i+1}  = h_i + z'_i w_i                 h = 0 where a stage begins
    z_{i+1}  = b_i(z'_i)                      the frozen block
    z'_{i+1} = z_{i+1} + θ(h_{i+1})           DTL, for i >= M; z_{i+1} before
             = z_{i+1} + g(θ(h_{i+1}))        DTL+: g a depthwise convolution, one for each stage
    θ(u)     = u σ(β u)

What is handed on is not h but its factors, [z'_0 a_0, z'_1 a_1, ...] and [c_0; c_1; ...], whose product it is: they
have d' channels for each tap. h and θ(h), which are as large as the features, are computed again in backward.

c is 0 at first, so that h and θ(h) are, and the network is the frozen one. Source: Disentangled Transfer Learning,
AAAI 2024, and its code for the order and the initialisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from convbn_compile.side_tuning._global_conv import GlobalConv, Grid
from convbn_compile.side_tuning._tap import Factors, Tap, Width


@dataclass(frozen=True)
class Settings:
    """What attach was asked for.

    Attributes:
        rank: d', of the taps.
        start: M, the first block whose output is adapted.
        plus: DTL+.
        kernel_size: of its convolutions.
        swish_beta: β.
    """

    rank: int
    start: int
    plus: bool
    kernel_size: int
    swish_beta: float


@dataclass(frozen=True)
class Part:
    """What a side network has at one block.

    Attributes:
        tap: of what the block gets.
        conv: DTL+'s, of what is added.
        beta: β.
        adapts: whether what the block returns is adapted.
    """

    tap: Tap
    conv: GlobalConv | None
    beta: float
    adapts: bool

    def adapted(self, z: Tensor, factors: Factors) -> Tensor:
        """What the block returned, adapted."""
        if not self.adapts:
            return z
        change: Any = checkpoint(self._change, *factors, use_reentrant=False, preserve_rng_state=False)
        adapted: Tensor = z + change.to(z.dtype)
        return adapted

    def _change(self, u: Tensor, c: Tensor) -> Tensor:
        """θ(h), in float32 at least, since β h overflows float16; and its convolution."""
        h = self.tap.product(Factors(u, c))
        change = swish(h.to(torch.promote_types(h.dtype, torch.float32)), self.beta)
        return change if self.conv is None else self.conv(change.to(self.conv.weight.dtype))


class SideNetwork(nn.Module):
    """Taps, and for DTL+ convolutions, of one task.

    As a module it hands on what it is called with, since it is a child of the model, and a Sequential calls those.

    Args:
        settings: of attach.
        widths: of each block that is tapped.
        grid: of tokens, if they are known to be patches.
    """

    def __init__(self, settings: Settings, widths: Sequence[Width], grid: Grid | None) -> None:
        super().__init__()
        self.settings, self.stages = settings, {one.block: str(one.stage) for one in widths}
        self.taps, self.convs = nn.ModuleDict(), nn.ModuleDict()
        for one in widths:
            self.taps[str(one.block)] = Tap(one.channels, settings.rank, one.dim).to(one.device, one.dtype)
            if settings.plus and str(one.stage) not in self.convs:
                conv = GlobalConv(one.channels, settings.kernel_size, one.dim, grid)
                self.convs[str(one.stage)] = conv.to(one.device, one.dtype)

    def forward(self, input: Any) -> Any:
        """The same."""
        return input

    def at(self, block: int) -> Part | None:
        """What it has at the block of this number; None if that is not tapped."""
        if block not in self.stages:
            return None
        tap: Any = self.taps[str(block)]
        conv: Any = self.convs[self.stages[block]] if self.settings.plus else None
        return Part(tap, conv, self.settings.swish_beta, block >= self.settings.start)


def swish(u: Tensor, beta: float) -> Tensor:
    """θ(u) = u σ(β u)."""
    return F.silu(beta * u) / beta

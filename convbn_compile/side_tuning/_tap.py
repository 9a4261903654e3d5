"""A low-rank tap of what a block gets, and the factors of the sum that taps make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


@dataclass(frozen=True)
class Width:
    """Of what a tap reads.

    Attributes:
        block: its number.
        stage: its number.
        channels: how many.
        dim: where they are, -1 or 1.
        dtype: of the block's first linear layer or convolution.
        device: where it is.
    """

    block: int
    stage: int
    channels: int
    dim: int
    dtype: torch.dtype | None
    device: torch.device | None


class Factors(NamedTuple):
    """Of h.

    Attributes:
        u: what the taps' a make of what they read, side by side in the dimension of the channels.
        c: of the taps, side by side in dimension 1.
    """

    u: Tensor
    c: Tensor


class Tap(nn.Module):
    """w = a c of what has its channels last, or in dimension 1.

    Args:
        width: of the backbone there.
        rank: d'.
        channels: the dimension, -1 or 1.
    """

    def __init__(self, width: int, rank: int, channels: int) -> None:
        layer: Any = _pointwise if channels == 1 else nn.Linear
        super().__init__()
        self.width, self.channels = width, channels
        self.a = layer(width, rank, bias=False)
        self.c = layer(rank, width, bias=False)
        nn.init.zeros_(self.c.weight)

    def forward(self, z: Tensor, before: Factors | None) -> Factors:
        """The factors of h behind a block, of what it gets and of those before it; None where a stage begins."""
        dtype = self.a.weight.dtype
        if z.dtype != dtype and (z.is_meta or not torch.is_autocast_enabled(z.device.type)):
            z = z.to(dtype)  # where norms are in float32 and the rest of the backbone is not
        u, c = self.a(z), self.c.weight
        if before is None:
            return Factors(u, c)
        return Factors(torch.cat([before.u.to(u), u], self.channels), torch.cat([before.c.to(c), c], 1))

    def product(self, factors: Factors) -> Tensor:
        """h."""
        h: Tensor = F.conv2d(*factors) if self.channels == 1 else F.linear(*factors)
        return h


def _pointwise(in_channels: int, out_channels: int, *, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, bias=bias)

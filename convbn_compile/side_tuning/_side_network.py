"""The Compact Side Network: low-rank taps of a frozen network, their running sum, and what of it goes back.

    w_i      = a_i c_i                        of rank d', without a bias
    h_{i+1}  = h_i + z'_i w_i                 h = 0 where a stage begins
    z_{i+1}  = b_i(z'_i)                      the frozen block
    z'_{i+1} = z_{i+1} + θ(h_{i+1})           DTL, for i >= M; z_{i+1} before
             = z_{i+1} + g(θ(h_{i+1}))        DTL+: g a depthwise convolution, one for each stage
    θ(u)     = u σ(β u)

c is 0 at first, so that h and θ(h) are, and the network is the frozen one. Source: Disentangled Transfer Learning,
AAAI 2024, and its code for the order and the initialisation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


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
class Grid:
    """Of tokens (B, L, C), which are the patches of an image after some others, such as the class token.

    Attributes:
        prefix: how many others.
        height: patches.
        width: patches.
    """

    prefix: int
    height: int
    width: int

    def of(self, length: int) -> tuple[int, int]:
        """Height and width of so many tokens: as they were made for, or of a square.

        Raises:
            ValueError: neither.
        """
        patches = length - self.prefix
        if patches == self.height * self.width:
            return self.height, self.width
        side = math.isqrt(max(patches, 0))
        if side * side != patches:
            raise ValueError(
                f"DTL+ convolves the grid of patches, {self.height} x {self.width} or a square, and of {length} tokens "
                f"{self.prefix} are others: {patches} patches are neither. Use plus=False."
            )
        return side, side


class Tap(nn.Sequential):
    """w = a c of what has its channels last, or in dimension 1.

    Args:
        width: of the backbone there.
        rank: d'.
        channels: the dimension, -1 or 1.
    """

    def __init__(self, width: int, rank: int, channels: int) -> None:
        layer = _pointwise if channels == 1 else nn.Linear
        super().__init__()
        self.width, self.channels = width, channels
        self.a = layer(width, rank, bias=False)
        self.c = layer(rank, width, bias=False)
        nn.init.zeros_(self.c.weight)


def _pointwise(in_channels: int, out_channels: int, *, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, bias=bias)


class GlobalConv(nn.Conv2d):
    """g: depthwise, of an image with channels in dimension 1 or last, or of tokens.

    Args:
        width: of the backbone there.
        kernel_size: odd.
        channels: the dimension, -1 or 1.
        grid: of tokens.
    """

    def __init__(self, width: int, kernel_size: int, channels: int, grid: Grid | None) -> None:
        super().__init__(width, width, kernel_size, padding=kernel_size // 2, groups=width, bias=False)
        self.channels, self.grid = channels, grid

    def forward(self, input: Tensor) -> Tensor:
        """Of a change of the backbone's features; the class token's is not convolved.

        Raises:
            ValueError: tokens that are no grid of patches.
        """
        if self.channels == 1:
            return super().forward(input)
        if input.dim() == 4:
            return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.grid is None:
            raise ValueError(
                f"DTL+ convolves the grid of patches, and of tokens {tuple(input.shape)} it is known for ViTs of timm "
                "and torchvision only. Use plus=False."
            )
        others, patches = input[:, : self.grid.prefix], input[:, self.grid.prefix :]
        image = patches.transpose(1, 2).reshape(len(input), -1, *self.grid.of(input.shape[1]))
        found = super().forward(image).flatten(2).transpose(1, 2)
        return torch.cat([others.to(found.dtype), found], 1)


@dataclass(frozen=True)
class Width:
    """Of what a tap reads.

    Attributes:
        block: its number.
        stage: its number.
        channels: how many.
        dim: where they are, -1 or 1.
    """

    block: int
    stage: int
    channels: int
    dim: int


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
        self.settings, self.stages = settings, {str(one.block): str(one.stage) for one in widths}
        self.taps = nn.ModuleDict({str(one.block): Tap(one.channels, settings.rank, one.dim) for one in widths})
        stages = {str(one.stage): one for one in widths} if settings.plus else {}
        size = settings.kernel_size
        self.convs = nn.ModuleDict(
            {stage: GlobalConv(one.channels, size, one.dim, grid) for stage, one in stages.items()}
        )

    def forward(self, input: Tensor) -> Tensor:
        """The same."""
        return input

    def taps_block(self, block: int) -> bool:
        """Whether what a block gets is tapped."""
        return str(block) in self.taps

    def gather(self, block: int, z: Tensor, h: Tensor | None) -> Tensor:
        """h behind a block, in float32 at least, for it is a sum of many.

        Args:
            block: its number.
            z: what the block gets.
            h: before it; None where a stage begins.

        Raises:
            ValueError: z has another number of channels than the block's first layer said.
        """
        tap: Any = self.taps[str(block)]
        if z.shape[tap.channels] != tap.width:
            raise ValueError(
                f"Block {block} was taken to get {tap.width} channels in dimension {tap.channels}, by its first layer, "
                f"but got {tuple(z.shape)}. Leave it out of attach's blocks."
            )
        w = tap(z)
        wide: Tensor = w.to(torch.promote_types(w.dtype, torch.float32))
        return wide if h is None else h + wide

    def adapt(self, block: int, z: Tensor, h: Tensor) -> Tensor:
        """What a block returned, adapted if the block is not before M.

        Args:
            block: its number.
            z: what it returned.
            h: behind it.
        """
        if block < self.settings.start:
            return z
        change = swish(h, self.settings.swish_beta)
        stage = self.stages[str(block)]
        return z + (self.convs[stage](change) if self.settings.plus else change).to(z.dtype)


def swish(u: Tensor, beta: float) -> Tensor:
    """θ(u) = u σ(β u)."""
    return F.silu(beta * u) / beta

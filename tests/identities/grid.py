"""The settings on which every identity is proved: rank, stride, padding, dilation, groups, transposed."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from convbn_compile._aten import ConvParams
from convbn_compile._channels import scale_output_channels, sum_over_output_channel

SETTINGS = [
    (rank, stride, padding, dilation, groups, transposed)
    for rank, stride, padding, dilation, groups, transposed in itertools.product(
        (1, 2, 3), (1, 2), (0, 1), (1, 2), (1, 2, 4), (False, True)
    )
]
IDS = ["{}d stride{} padding{} dilation{} groups{} {}".format(*s[:5], "transposed" if s[5] else "") for s in SETTINGS]
TOLERANCE = 1e-12


@dataclass(frozen=True)
class Case:
    """Random float64 tensors of one setting."""

    conv: ConvParams
    input: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor
    grad_output: Tensor


def case(setting: tuple[int, int, int, int, int, bool], seed: int = 0) -> Case:
    """C_in = 4 and C_out = 8, so that no axis can be taken for another; groups = 4 is depthwise."""
    rank, stride, padding, dilation, groups, transposed = setting
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    output_padding = (1,) * rank if transposed and (stride > 1 or dilation > 1) else (0,) * rank
    conv = ConvParams((stride,) * rank, (padding,) * rank, (dilation,) * rank, transposed, output_padding, groups)
    kernel = (3, 2, 3)[:rank]
    weight = random(4, 8 // groups, *kernel) if transposed else random(8, 4 // groups, *kernel)
    input = random(2, 4, *(7, 6, 5)[:rank])
    return Case(conv, input, weight, random(8), random(8), torch.randn_like(conv.forward(input, weight)))


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value."""
    assert found.shape == wanted.shape
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


# Mutants: wrong versions of _channels.scale_output_channels and sum_over_output_channel, and a setting that must tell.

PLAIN, GROUPED_TRANSPOSED = (2, 1, 0, 1, 1, False), (2, 1, 0, 1, 2, True)


def without_scale(weight: Tensor, scale: Tensor, conv: ConvParams) -> Tensor:
    return weight


def of_another_channel(weight: Tensor, scale: Tensor, conv: ConvParams) -> Tensor:
    return scale_output_channels(weight, scale.flip(0), conv)


def of_first_group(weight: Tensor, scale: Tensor, conv: ConvParams) -> Tensor:
    """As if all groups of a transposed convolution had the channels of the first."""
    return weight * scale[: weight.shape[1]].reshape(1, -1, *(1,) * (weight.dim() - 2))


SCALE_MUTANTS = [(without_scale, PLAIN), (of_another_channel, PLAIN), (of_first_group, GROUPED_TRANSPOSED)]


def of_the_wrong_axis(weight: Tensor, conv: ConvParams) -> Tensor:
    """As if a transposed convolution's channels lay as a grouped forward one's."""
    return weight.flatten(1).sum(1).repeat(conv.groups)


def without_kernel(weight: Tensor, conv: ConvParams) -> Tensor:
    return sum_over_output_channel(weight[..., :1], conv)


SUM_MUTANTS = [(of_the_wrong_axis, GROUPED_TRANSPOSED), (without_kernel, PLAIN)]

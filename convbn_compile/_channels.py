"""Where the output channels of a convolution or linear layer lie in its weight: the only file that knows it.

forward     weight [C_out, C_in/groups, *k]     output channel c is weight[c]
transposed  weight [C_in, C_out/groups, *k]     group j maps rows j*C_in/groups ... to its own C_out/groups channels

A linear layer's weight is [C_out, C_in]: groups = 1 and no kernel; x @ w is the transposed one.
"""

from __future__ import annotations

from torch import Tensor

from convbn_compile._aten import LinearParams


def scale_output_channels(weight: Tensor, scale: Tensor, conv: LinearParams) -> Tensor:
    """s . w: the weight with output channel c multiplied by scale[c]; keeps the weight's memory format.

    Args:
        weight: [C_out, C_in/groups, *k], transposed: [C_in, C_out/groups, *k].
        scale: [C_out].
        conv: says which axis of the weight is the output channels'.
    """
    kernel = (1,) * (weight.dim() - 2)
    if not conv.transposed:
        return weight * scale.reshape(-1, 1, *kernel)
    per_group = scale.reshape(conv.groups, 1, -1).expand(-1, weight.shape[0] // conv.groups, -1)
    return weight * per_group.reshape(*weight.shape[:2], *kernel)


def sum_over_output_channel(weight: Tensor, conv: LinearParams) -> Tensor:
    """The sum of all the weight's entries that belong to one output channel: [C_out]."""
    if not conv.transposed:
        return weight.sum(list(range(1, weight.dim())))
    over_kernel = weight.reshape(*weight.shape[:2], -1).sum(2)
    return over_kernel.reshape(conv.groups, -1, weight.shape[1]).sum(1).reshape(-1)

"""Move an output-channel scale from the output of a convolution into its weight.

    s . (w (*) x) = (s . w) (*) x                                                            (1)

    s  scale   [C_out]
    x  input   [N, C_in, *spatial]
    w  weight  [C_out, C_in/groups, *k], transposed: [C_in, C_out/groups, *k]
    s . w scales w along its output channels; s . y broadcasts s over dim 1 of y.

Legal because a convolution is linear in its weight, output channel by output channel.
Exact in real arithmetic; in floating point it rounds s . w once where the left side rounds each output once.
Does not apply if: s varies over N or space. If something else reads w (*) x too, it adds a convolution.
Source: You et al., Efficient ConvBN Blocks (Tune mode), arXiv 2305.11624, Table 2.
"""

from __future__ import annotations

from torch import Tensor

from convbn_compile._aten import ConvParams
from convbn_compile._channels import scale_output_channels


def before(scale: Tensor, input: Tensor, weight: Tensor, conv: ConvParams) -> Tensor:
    """S . (w (*) x)."""
    return conv.forward(input, weight) * scale.reshape(-1, *(1,) * (weight.dim() - 2))


def after(scale: Tensor, input: Tensor, weight: Tensor, conv: ConvParams) -> Tensor:
    """(s . w) (*) x."""
    return conv.forward(input, scale_output_channels(weight, scale, conv))

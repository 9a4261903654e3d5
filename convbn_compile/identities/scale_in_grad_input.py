"""Move an output-channel scale from the gradient of the output into the weight.

    grad_input(s . g, w) = grad_input(g, s . w)                                              (2)

    s  scale        [C_out]                g  grad_output  [N, C_out, *spatial_out]
    w  weight       [C_out, C_in/groups, *k], transposed: [C_in, C_out/groups, *k]
    x  input        [N, C_in, *spatial], read for its shape only

Legal because grad_input is linear in g and in w and sums over the output channels, along which s varies.
Exact in real arithmetic; in floating point it reassociates one multiplication per product.
Does not apply if: s varies over N or space.
Source: You et al., Efficient ConvBN Blocks (Tune mode), arXiv 2305.11624, Table 2.
"""

from __future__ import annotations

from torch import Tensor

from convbn_compile._aten import ConvParams
from convbn_compile._channels import scale_output_channels


def before(grad_output: Tensor, scale: Tensor, input: Tensor, weight: Tensor, conv: ConvParams) -> Tensor:
    """grad_input(s . g, w)."""
    scaled = grad_output * scale.reshape(-1, *(1,) * (weight.dim() - 2))
    grad_input, _ = conv.backward(scaled, input, weight, needs_input=True, needs_weight=False)
    assert grad_input is not None
    return grad_input


def after(grad_output: Tensor, scale: Tensor, input: Tensor, weight: Tensor, conv: ConvParams) -> Tensor:
    """grad_input(g, s . w)."""
    folded = scale_output_channels(weight, scale, conv)
    grad_input, _ = conv.backward(grad_output, input, folded, needs_input=True, needs_weight=False)
    assert grad_input is not None
    return grad_input

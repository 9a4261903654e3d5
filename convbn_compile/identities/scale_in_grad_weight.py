"""Move an output-channel scale from the gradient of the output to the gradient of the weight.

    grad_weight(s . g, x) = s . grad_weight(g, x)                                            (3)

    s  scale        [C_out]                g  grad_output  [N, C_out, *spatial_out]
    x  input        [N, C_in, *spatial]    w  weight, read for its shape only
    s . scales the *output* axis of the weight: not dim 0 if transposed, nor all of dim 1 if also grouped.

Legal because grad_weight is linear in g and keeps the output channels apart.
Exact in real arithmetic; in floating point it scales each sum once instead of each of its terms.
Does not apply if: s varies over N or space.
Source: You et al., Efficient ConvBN Blocks (Tune mode), arXiv 2305.11624, Table 2.
"""

from __future__ import annotations

from torch import Tensor

from convbn_compile._aten import ConvParams
from convbn_compile._channels import scale_output_channels


def before(grad_output: Tensor, scale: Tensor, input: Tensor, weight: Tensor, conv: ConvParams) -> Tensor:
    """grad_weight(s . g, x)."""
    scaled = grad_output * scale.reshape(-1, *(1,) * (weight.dim() - 2))
    _, grad_weight = conv.backward(scaled, input, weight, needs_input=False, needs_weight=True)
    assert grad_weight is not None
    return grad_weight


def after(grad_output: Tensor, scale: Tensor, input: Tensor, weight: Tensor, conv: ConvParams) -> Tensor:
    """S . grad_weight(g, x)."""
    _, grad_weight = conv.backward(grad_output, input, weight, needs_input=False, needs_weight=True)
    assert grad_weight is not None
    return scale_output_channels(grad_weight, scale, conv)

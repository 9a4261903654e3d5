"""Take the inner product of a gradient with a convolution's output from the weight's gradient instead.

    <g, w (*) x>_c = <grad_weight(g, x), w>_c          for each output channel c               (4)

    g  grad_output  [N, C_out, *spatial_out]           x  input  [N, C_in, *spatial]
    w  weight       [C_out, C_in/groups, *k], transposed: [C_in, C_out/groups, *k]
    <., .>_c sums over everything but the output channel; both sides are [C_out].

Legal because w (*) x is linear in w, so that its derivative along w itself is its value (Euler).
This is what frees the convolution's output: the gradient of batch norm's weight was its only reader in backward.
Exact in real arithmetic; in floating point the right side sums fewer, larger terms.
Costs a weight gradient: where nothing else needs one, it adds a convolution.
Source: follows from You et al., Efficient ConvBN Blocks (Tune mode), arXiv 2305.11624, section 3.4.1.
"""

from __future__ import annotations

from torch import Tensor

from convbn_compile._aten import ConvParams
from convbn_compile._channels import sum_over_output_channel


def before(grad_output: Tensor, input: Tensor, weight: Tensor, conv: ConvParams) -> Tensor:
    """<g, w (*) x> per output channel."""
    over = [0, *range(2, grad_output.dim())]
    return (grad_output * conv.forward(input, weight)).sum(over)


def after(grad_output: Tensor, input: Tensor, weight: Tensor, conv: ConvParams) -> Tensor:
    """<grad_weight(g, x), w> per output channel."""
    _, grad_weight = conv.backward(grad_output, input, weight, needs_input=False, needs_weight=True)
    assert grad_weight is not None
    return sum_over_output_channel(grad_weight * weight, conv)

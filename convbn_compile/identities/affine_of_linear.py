"""Fold a per-channel affine map, such as batch norm on running statistics, into what is linear before it: Tune mode.

    sum over k of s_k . (w_k (*) x + b_k) + t = W (*) x + b'     W = merge(s_k . w_k),  b' = sum of s_k * b_k + t
    batch norm of one:  s = gamma / sqrt(var + eps),  t = beta - mean * s

and, with g a gradient in backward, every c, p, q, a known per channel, and dW = grad_weight(g, x), g' = sum of g over
all but the channel,

    sum over k of grad_input(c_k . g, w_k)             = grad_input(g, merge(c_k . w_k))              by (2), (5)
    grad_weight(c_k . g, x)                            = c_k . take_k(dW)                             by (3), (5)
    sum of (q . g) * (sum of p_k . (w_k (*) x) + a)    = q * (sum of p_k * <take_k(dW), w_k>_c + a * g')      by (4)

    x  input  [N, C_in, *spatial]      w_k  weight  [C_out, C_in/groups, *k], transposed: [C_in, C_out/groups, *k]
    b_k, s_k, t, c_k, p_k, q, a, b', g'   [C_out]; b may be absent; merge and take are those of (5)

The last line is how the gradient of gamma reads the convolution's output, once or more often, however the affine map is
spelled. The output is not an operand of any right side: it need not be saved.
Legal because the operator is linear in its weight, output channel by output channel. No equation asks where g comes
from, so that nothing needs to be known of what autograd wrote but these three forms.
Exact in real arithmetic. In floating point: s, s . w and b' are computed in the widest dtype of the weights and of what
the map reads, at least float32; W is rounded once to the operator's dtype, b' not at all: it is added in the wide one,
since its rounding would be the same for a whole channel. Under autocast the weight is read before its cast.
In float16 the largest |c_k| stays with g: dW = dw / c need not fit into that range.
Each scale of one branch may also stay where it is, on the output or on g: (1) and (2) hold in both directions, and the
output need not be saved either way. Which is cheaper depends on the sizes of weight and output.
Does not apply if: something else reads an output; the map does not scale, or not along the output channels.
Source: You et al., Efficient ConvBN Blocks (Tune mode), arXiv 2305.11624, section 3.4 and Table 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from convbn_compile._channels import scale_output_channels, sum_over_output_channel
from convbn_compile._form import Form, Value, is_zero, over, plus, times
from convbn_compile.identities.sum_of_branches import Merged, add, diagonal, identity, take


@dataclass(frozen=True)
class Needs:
    """Which gradients something reads: the input's, and of each branch the weight's and the bias'."""

    input: bool
    weights: tuple[bool, ...]
    biases: tuple[bool, ...]


Weights = Sequence[Tensor | None]
"""Of each branch; None is the input itself."""


def before(outputs: Sequence[Tensor], form: Form) -> Tensor:
    """The sum of s_k . y_k, plus t."""
    per_channel = (-1,) + (1,) * (outputs[0].dim() - 2)

    def spread(value: Value) -> Value:
        return value.reshape(per_channel) if isinstance(value, Tensor) else value

    result: Any = spread(form.shift)
    for scale, output in zip(form.scales, outputs, strict=True):
        result = result + spread(scale) * output
    return result  # type: ignore[no-any-return]


def fold(
    weights: Weights, form: Form, merged: Merged, *, channels: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """W in `dtype`, and the form's shift in the wide one, None if it is 0."""
    like = next(weight for weight in weights if weight is not None)
    terms = [
        None
        if weight is None and is_zero(scale)
        else _times_output_channel(weight, scale, merged, like.new_ones(channels))
        for weight, scale in zip(weights, form.scales, strict=True)
    ]
    computed = [term is not weight for term, weight in zip(terms, weights, strict=True)]
    folded_weight = add(terms, merged, computed).to(dtype)
    if folded_weight.dim() > 2 and folded_weight.shape[1] == 1:
        # any stride is right for that axis, but convolutions read the layout from it
        folded_weight = folded_weight.as_strided(folded_weight.shape, folded_weight.stride())
    return folded_weight, None if is_zero(form.shift) else per_channel(form.shift, channels, like)


def per_channel(value: Value, channels: int, like: Tensor) -> Tensor:
    """A value as a tensor [channels]."""
    return value.expand(channels) if isinstance(value, Tensor) else like.new_full([channels], value)


def forward(
    input: Tensor, folded_weight: Tensor, shift: Tensor | None, merged: Merged, itself: Tensor | None = None
) -> Tensor:
    """W (*) x + b', and s_k . x for an input that is not in W; in the dtype of W if that is as wide, else in theirs."""
    if itself is None and (shift is None or folded_weight.dtype == shift.dtype):
        return merged.params.forward(input, folded_weight, shift)
    output = merged.params.forward(input, folded_weight)
    if itself is not None:
        output = output + _times_channel(input, itself)
    return output if shift is None else output + shift.reshape(-1, *(1,) * (output.dim() - 2))


def backward(
    grad_output: Tensor,
    input: Tensor,
    weights: Weights,
    operator_weight: Tensor,
    scales: Sequence[Value],
    products: Sequence[tuple[Form, Value]],
    merged: Merged,
    *,
    needs: Needs,
    in_weight: bool = True,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor]]:
    """Gradients of the input, and of each weight and bias, None where not needed, and a sum [C_out] for each product.

    Args:
        grad_output: g.
        input: x.
        weights: w_k, in the wide dtype.
        operator_weight: merge(c_k . w_k) in the operator's dtype, or w.
        scales: c_k.
        products: the form of each (p, a), and each q.
        merged: the operator.
        needs: which gradients are wanted.
        in_weight: c is in the operator's weight; else it is applied to g, as (2) from right to left has it.
    """
    kept = stays(scales, operator_weight.dtype)
    wide = next(weight.dtype for weight in weights if weight is not None)

    def of_operator(factor: Value, *, needs_input: bool, needs_weight: bool) -> Any:
        narrow = _times_channel(grad_output, factor).to(operator_weight.dtype)
        return merged.params.backward(
            narrow, input, operator_weight, needs_input=needs_input, needs_weight=needs_weight
        )

    needs_weight = any(needs.weights) or bool(products)
    grad_input, grad_folded = of_operator(kept, needs_input=needs.input and in_weight, needs_weight=needs_weight)
    if not in_weight:
        grad_input, _ = of_operator(scales[0], needs_input=needs.input, needs_weight=False)
    grad_shift = grad_output.sum([0, *range(2, grad_output.dim())], dtype=wide)
    grad_biases = [grad_shift * scale if wanted else None for scale, wanted in zip(scales, needs.biases, strict=True)]
    if not needs_weight:
        return grad_input, [None] * len(weights), grad_biases, []
    parts = [take(grad_folded.to(wide), merged, branch) for branch in range(len(weights))]
    grad_weights = [
        _times_output_channel(part, over(scale, kept), merged, torch.ones_like(grad_shift)) if wanted else None
        for part, scale, wanted in zip(parts, scales, needs.weights, strict=True)
    ]
    if len(parts) > 1:  # nobody's gradient may be a part of another's
        grad_weights = [part.clone() if part is grad else grad for part, grad in zip(parts, grad_weights, strict=True)]
    inner = [over(_inner_product(part, weight, merged), kept) for part, weight in zip(parts, weights, strict=True)]
    return grad_input, grad_weights, grad_biases, [_sum(inner, grad_shift, *product) for product in products]


def stays(scales: Sequence[Value], dtype: torch.dtype) -> Value:
    """What of c stays with g in backward instead of going into W: in float16 the largest |c|, within limits."""
    if dtype is not torch.float16:
        return 1.0
    least, most = 2.0**-8, 2.0**8
    numbers = [abs(scale) for scale in scales if not isinstance(scale, Tensor)]
    tensors = [scale.abs() for scale in scales if isinstance(scale, Tensor)]
    if not tensors:
        return min(max(*numbers, least), most)
    return reduce(torch.maximum, tensors).clamp(max(*numbers, least) if numbers else least, most)


def _times_output_channel(weight: Tensor | None, scale: Value, merged: Merged, ones: Tensor) -> Tensor:
    """S . w for one branch, of the input itself if there is no weight."""
    weight = identity(ones, merged) if weight is None else weight
    if isinstance(scale, Tensor):
        return scale_output_channels(weight, scale.expand(len(ones)), merged.params)
    return weight if scale == 1 else weight * scale


def _inner_product(part: Tensor, weight: Tensor | None, merged: Merged) -> Tensor:
    """<dW, w>_c; of the input itself, what the diagonal has of dW."""
    return diagonal(part, merged) if weight is None else sum_over_output_channel(part * weight, merged.params)


def _sum(inner: Sequence[Tensor], grad_shift: Tensor, form: Form, factor: Value) -> Tensor:
    """Sum of (q . g) * (sum of p_k . (w_k (*) x) + a), from every <dW, w_k>_c and g'."""
    terms = [times(product, scale) for product, scale in zip(inner, form.scales, strict=True)]
    result = times(reduce(plus, [*terms, times(grad_shift, form.shift)]), factor)
    return result if isinstance(result, Tensor) else torch.full_like(grad_shift, result)


def _times_channel(grad: Tensor, factor: Value) -> Tensor:
    if isinstance(factor, Tensor):
        return grad * factor.reshape(-1, *(1,) * (grad.dim() - 2))
    return grad if factor == 1 else grad * factor

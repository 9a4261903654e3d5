"""Fold a batch norm on running statistics into the convolution before it: Tune mode.

    BN(w (*) x + b) = (s . w) (*) x + b'      s = gamma * invstd,   b' = beta + (b - mean) * s
                                              invstd = 1 / sqrt(var + eps)

and, with g the gradient of the output, dW' = grad_weight(g, x) and db' = sum of g over all but the channel,

    dx     = grad_input(g, s . w)                                   by (2)
    dw     = s . dW'                                                by (3)
    db     = s * db'
    dgamma = (<dW', w>_c + db' * (b - mean)) * invstd               by (4)
    dbeta  = db'

    x  input  [N, C_in, *spatial]      w  weight  [C_out, C_in/groups, *k], transposed: [C_in, C_out/groups, *k]
    b  bias, gamma, beta, mean, var, s, invstd, b', db'   [C_out];  b, gamma, beta may be absent (0, 1, 0)

Legal because batch norm on running statistics is affine per channel, and its channel axis, dim 1, is the
convolution's output-channel axis. The convolution's output is not an operand of any right side: it need not be saved.
Exact in real arithmetic. In floating point: s, s . w and b' are computed in the widest dtype of the parameters and
statistics, at least float32; s . w is rounded once to the convolution's dtype, b' not at all: it is added in the wide
one, since its rounding would be the same for a whole channel. Under autocast the weight is read before its cast.
Does not apply if: batch statistics are used; something else reads the convolution's output; a cast or any
operation lies in between; the gradients do not meet in one convolution_backward.
Source: You et al., Efficient ConvBN Blocks (Tune mode), arXiv 2305.11624, section 3.4 and Table 2.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from convbn_compile._aten import (
    BatchNorm,
    BatchNormBackward,
    Convolution,
    ConvolutionBackward,
    ConvParams,
    before_cast,
    value,
)
from convbn_compile._channels import scale_output_channels, sum_over_output_channel
from convbn_compile._splice import replace, splice
from convbn_compile.report import NoMatch

# --- the two sides -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """Which gradients something reads."""

    input: bool = True
    weight: bool = True
    bias: bool = True
    gamma: bool = True
    beta: bool = True

    @property
    def grad_folded_weight(self) -> bool:
        """dW', which both dw and dgamma are made of."""
        return self.weight or self.gamma

    @property
    def grad_shift(self) -> bool:
        """db', which db, dbeta and dgamma are made of."""
        return self.bias or self.beta or self.gamma


def before(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    *,
    eps: float,
    conv: ConvParams,
) -> Tensor:
    """BN(w (*) x + b), as torch computes it."""
    output = conv.forward(input, weight, bias)
    return torch.nn.functional.batch_norm(output, mean, var, gamma, beta, training=False, eps=eps)


def fold(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    mean: Tensor,
    var: Tensor,
    *,
    eps: float,
    conv: ConvParams,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s . w in the convolution's dtype; s, invstd and b - mean in the wide one, [C_out]: all that backward reads."""
    wide = _wide(weight, gamma, mean, var)
    invstd = torch.rsqrt(var.to(wide) + eps)
    scale = invstd if gamma is None else gamma.to(wide) * invstd
    offset = -mean.to(wide) if bias is None else bias.to(wide) - mean.to(wide)
    folded_weight = scale_output_channels(weight.to(wide), scale, conv).to(dtype)
    if weight.shape[1] == 1:  # any stride is right for that axis, but convolutions read the layout from it
        folded_weight = folded_weight.as_strided(folded_weight.shape, folded_weight.stride())
    return folded_weight, scale, invstd, offset


def forward(
    input: Tensor,
    folded_weight: Tensor,
    beta: Tensor | None,
    scale: Tensor,
    offset: Tensor,
    *,
    conv: ConvParams,
) -> Tensor:
    """(s . w) (*) x + b', in the dtype of s . w."""
    shift = offset * scale
    shift = shift if beta is None else shift + beta.to(scale.dtype)
    if folded_weight.dtype == scale.dtype:
        return conv.forward(input, folded_weight, shift)
    output = conv.forward(input, folded_weight) + shift.reshape(-1, *(1,) * (folded_weight.dim() - 2))
    return output.to(folded_weight.dtype)


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    folded_weight: Tensor,
    scale: Tensor,
    invstd: Tensor,
    offset: Tensor,
    *,
    conv: ConvParams,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Dx in the convolution's dtype; dw, db, dgamma, dbeta in the wide one; None where not needed.

    (2), (3) and (4) meet in one convolution_backward: its weight gradient does not read the weight's values.
    """
    wide = scale.dtype
    grad_input = grad_weight = grad_bias = grad_gamma = grad_shift = None
    if needs.input or needs.grad_folded_weight:
        grad_input, grad_folded_weight = conv.backward(
            grad_output, input, folded_weight, needs_input=needs.input, needs_weight=needs.grad_folded_weight
        )
    if needs.grad_shift:
        grad_shift = grad_output.sum([0, *range(2, grad_output.dim())], dtype=wide)
    if needs.weight:
        assert grad_folded_weight is not None
        grad_weight = scale_output_channels(grad_folded_weight.to(wide), scale, conv)
    if needs.bias:
        assert grad_shift is not None
        grad_bias = grad_shift * scale
    if needs.gamma:
        assert grad_folded_weight is not None and grad_shift is not None
        inner = sum_over_output_channel(grad_folded_weight.to(wide) * weight.to(wide), conv)
        grad_gamma = (inner + grad_shift * offset) * invstd
    return grad_input, grad_weight, grad_bias, grad_gamma, grad_shift if needs.beta else None


def _wide(*tensors: Tensor | None) -> torch.dtype:
    """The widest dtype of the tensors, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    return dtype


# --- where it applies ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """A batch norm and the convolution that it can be folded into, with their backward nodes if there are any."""

    norm: BatchNorm
    conv: Convolution
    norm_backward: BatchNormBackward | None
    conv_backward: ConvolutionBackward | None

    @property
    def needs(self) -> Needs:
        """The gradients that the graph reads."""
        norm, conv = self.norm_backward, self.conv_backward
        return Needs(
            input=conv is not None and conv.grad_input is not None,
            weight=conv is not None and conv.grad_weight is not None,
            bias=conv is not None and conv.grad_bias is not None,
            gamma=norm is not None and norm.grad_weight is not None,
            beta=norm is not None and norm.grad_bias is not None,
        )


def match(norm: BatchNorm) -> Match | NoMatch:
    """The pair that `norm` closes, or why there is none."""
    if norm.training:
        return NoMatch("it runs on batch statistics (training mode)")
    if norm.output is None:
        return NoMatch("nothing reads its output")
    conv = Convolution.of(norm.input)
    if conv is None:
        return NoMatch(f"its input comes from {_origin(norm.input)}, not from a convolution")
    if not conv.params.is_static:
        return NoMatch("the convolution's stride, padding or dilation is computed in the graph")
    output, normalised = value(conv.node), value(norm.output)
    if not output.is_floating_point() or output.dtype != normalised.dtype:
        return NoMatch(f"the convolution computes in {output.dtype}, the batch norm in {normalised.dtype}")
    return _match_backward(norm, conv)


def _match_backward(norm: BatchNorm, conv: Convolution) -> Match | NoMatch:
    """Extend a forward pair by its backward nodes; every reader of the pair's inside must be one of them."""
    backwards = [found for user in conv.node.users if (found := BatchNormBackward.of(user)) is not None]
    norm_backward = backwards[0] if backwards else None
    known = {norm.node} if norm_backward is None else {norm.node, norm_backward.node}
    readers = len(set(conv.node.users) - known)
    if readers:
        return NoMatch(f"the convolution's output is read by {readers} other node{'s' if readers > 1 else ''}")
    if not _reads_only(norm, norm_backward):
        return NoMatch("its saved statistics are read by something else")
    if norm_backward is None:
        return Match(norm, conv, None, None)
    if not _same_parameters(norm, norm_backward):
        return NoMatch("its backward reads other parameters than its forward")
    if norm_backward.grad_input is None:
        return Match(norm, conv, norm_backward, None)
    conv_backward = _only_reader(norm_backward.grad_input)
    if conv_backward is None or not _same_convolution(conv, conv_backward):
        return NoMatch("the gradient of the convolution's output is read by something else than its backward")
    return Match(norm, conv, norm_backward, conv_backward)


def _origin(node: Node) -> str:
    """What computes a node, in words."""
    if node.op == "placeholder":
        return "outside this graph"
    while node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
    return str(node.target).removesuffix(".default")


def _reads_only(norm: BatchNorm, norm_backward: BatchNormBackward | None) -> bool:
    """Nothing but the pair's own backward reads the statistics that the forward node saves."""
    own = None if norm_backward is None else norm_backward.node
    saved = [user for user in norm.node.users if user is not norm.output]
    return all(reader is own for user in saved for reader in user.users)


def _same_parameters(norm: BatchNorm, other: BatchNormBackward) -> bool:
    return (norm.weight, norm.running_mean, norm.running_var, norm.eps) == (
        other.weight,
        other.running_mean,
        other.running_var,
        other.eps,
    )


def _only_reader(grad: Node) -> ConvolutionBackward | None:
    """The convolution_backward that alone reads `grad`, as its grad_output."""
    readers = list(grad.users)
    found = ConvolutionBackward.of(readers[0]) if len(readers) == 1 else None
    return found if found is not None and found.grad_output is grad else None


def _same_convolution(conv: Convolution, other: ConvolutionBackward) -> bool:
    return (conv.input, conv.weight, conv.params) == (other.input, other.weight, other.params)


# --- the splice ----------------------------------------------------------------------------------------------------


def rewrite(found: Match) -> None:
    """Replace the left side by the right side in the graph; what is left of the old nodes is dead."""
    norm, conv = found.norm, found.conv
    weight = before_cast(conv.weight)
    bias = None if conv.bias is None else before_cast(conv.bias)
    assert norm.output is not None and norm.running_mean is not None
    folded_weight, scale, invstd, offset = splice(
        partial(fold, eps=norm.eps, conv=conv.params, dtype=value(conv.weight).dtype),
        weight,
        bias,
        norm.weight,
        norm.running_mean,
        norm.running_var,
        before=norm.node,
        recompute=True,
    )
    (output,) = splice(
        partial(forward, conv=conv.params),
        conv.input,
        folded_weight,
        norm.bias,
        scale,
        offset,
        before=norm.node,
    )
    assert output is not None
    replace(norm.output, output)
    if found.norm_backward is not None:
        read_by_backward = folded_weight if found.needs.input else conv.weight
        _rewrite_backward(found, (weight, read_by_backward, scale, invstd, offset))


def _rewrite_backward(found: Match, tensors: tuple[Node | None, ...]) -> None:
    norm, conv = found.norm_backward, found.conv_backward
    assert norm is not None
    old = (
        None if conv is None else conv.grad_input,
        None if conv is None else conv.grad_weight,
        None if conv is None else conv.grad_bias,
        norm.grad_weight,
        norm.grad_bias,
    )
    new = splice(
        partial(backward, conv=found.conv.params, needs=found.needs),
        norm.grad_output,
        found.conv.input,
        *tensors,
        before=norm.node,
    )
    for old_gradient, new_gradient in zip(old, new, strict=True):
        if old_gradient is not None:
            assert new_gradient is not None
            replace(old_gradient, new_gradient)

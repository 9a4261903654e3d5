"""Fold a per-channel affine map, such as batch norm on running statistics, into what is linear before it: Tune mode.

    s . (w (*) x + b) + t = (s . w) (*) x + b'      b' = s * b + t
    batch norm:  s = gamma / sqrt(var + eps),  t = beta - mean * s

and, with g a gradient in backward, c and every p, q, a known per channel, and dW' = grad_weight(g, x), g' = sum of g
over all but the channel,

    grad_input(c . g, w)                     = grad_input(g, c . w)                                   by (2)
    grad_weight(c . g, x)                    = c . dW'                                                by (3)
    sum of (q . g) * (p . (w (*) x + b) + a) = q * (p * (<dW', w>_c + b * g') + a * g')               by (4)

    x  input  [N, C_in, *spatial]      w  weight  [C_out, C_in/groups, *k], transposed: [C_in, C_out/groups, *k]
    b, s, t, c, p, q, a, b', g'   [C_out]; b may be absent

The last line is how the gradient of gamma reads the convolution's output, once or more often, however the affine map is
spelled. The output is not an operand of any right side: it need not be saved.
Legal because the operator is linear in its weight, output channel by output channel. No equation asks where g comes
from, so that nothing needs to be known of what autograd wrote but these three forms.
Exact in real arithmetic. In floating point: s, s . w and b' are computed in the widest dtype of the weight and of what
the map reads, at least float32; s . w is rounded once to the operator's dtype, b' not at all: it is added in the wide
one, since its rounding would be the same for a whole channel. Under autocast the weight is read before its cast.
In float16 |c| stays with g, and only its sign goes into the weight: dW' = dw / c need not fit into that range.
Each scale may also stay where it is, on the output or on g: (1) and (2) hold in both directions, and the output need
not be saved either way. Which is cheaper depends on the sizes of weight and output.
Does not apply if: something else reads the output; the map does not scale, or not along the output channels.
Source: You et al., Efficient ConvBN Blocks (Tune mode), arXiv 2305.11624, section 3.4 and Table 2.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from convbn_compile import _torch
from convbn_compile._aten import (
    Adjoint,
    Gradients,
    LinearOperator,
    LinearParams,
    before_cast,
    convert_element_type,
    value,
)
from convbn_compile._channels import scale_output_channels, sum_over_output_channel
from convbn_compile._layout import REAPPLIED
from convbn_compile._per_channel import (
    Link,
    Scale,
    Steps,
    apply,
    operands,
    plus,
    times,
    to_dtype,
    upwards,
    with_tensors,
)
from convbn_compile._region import Region
from convbn_compile._splice import reapply, replace, splice
from convbn_compile.report import NoMatch

# --- the two sides -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """Which gradients something reads."""

    input: bool = True
    weight: bool = True
    bias: bool = True


def before(input: Tensor, weight: Tensor, bias: Tensor | None, steps: Steps, *, conv: LinearParams) -> Tensor:
    """The operator, then one step after the other; their operands are [C_out] or [1]."""
    output = conv.forward(input, weight, bias)
    per_channel = (-1,) + (1,) * (output.dim() - 2)
    tensors = {step.operand: step.operand.reshape(per_channel) for step in steps if isinstance(step.operand, Tensor)}
    for step in steps:
        operand = tensors.get(step.operand, step.operand)
        if isinstance(step, Scale):
            output = output / operand if step.inverse else output * operand
        else:
            output = output + operand * step.factor
    return output


def fold(
    weight: Tensor,
    bias: Tensor | None,
    steps: Steps,
    *,
    conv: LinearParams,
    channels: int,
    dtype: torch.dtype,
    in_backward: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """s . w in `dtype`, and b' in the wide one, None if it is 0; in backward, without what stays with g."""
    wide = _wide(weight, steps)
    scale, shift = apply(to_dtype(steps, wide), 1.0, 0.0 if bias is None else bias.to(wide))
    if in_backward:
        scale = _over(scale, stays(scale, dtype))
    folded_weight = _scaled(weight.to(wide), scale, conv=conv, channels=channels).to(dtype)
    if weight.dim() > 2 and weight.shape[1] == 1:
        # any stride is right for that axis, but convolutions read the layout from it
        folded_weight = folded_weight.as_strided(folded_weight.shape, folded_weight.stride())
    if isinstance(shift, Tensor):
        return folded_weight, shift.expand(channels)
    return folded_weight, weight.new_full([channels], shift, dtype=wide) if shift else None


def stays(scale: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """What of c stays with g in backward instead of going into the weight: in float16 |c|, within limits."""
    if dtype is not torch.float16:
        return 1.0
    least, most = 2.0**-8, 2.0**8
    return scale.abs().clamp(least, most) if isinstance(scale, Tensor) else min(max(abs(scale), least), most)


def forward(input: Tensor, folded_weight: Tensor, shift: Tensor | None, *, conv: LinearParams) -> Tensor:
    """(s . w) (*) x + b', in the dtype of s . w if that is as wide as b', else in that of b'."""
    if shift is None or folded_weight.dtype == shift.dtype:
        return conv.forward(input, folded_weight, shift)
    output = conv.forward(input, folded_weight)
    return output + shift.reshape(-1, *(1,) * (output.dim() - 2))


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    operator_weight: Tensor,
    scales: Steps,
    products: Sequence[tuple[Steps, Steps]],
    *,
    conv: LinearParams,
    needs: Needs,
    in_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Any]]:
    """Gradients of input, weight and bias, None where not needed, and a sum [C_out] for each product.

    Args:
        grad_output: g.
        input: x.
        weight: w.
        bias: b.
        operator_weight: c . w in the operator's dtype, or w.
        scales: c.
        products: the steps of each (p, a) and of each q.
        conv: the operator.
        needs: which of the first three are wanted.
        in_weight: c is in the operator's weight; else it is applied to g, as (2) from right to left has it.
    """
    wide = _wide(weight, scales, *(steps for pair in products for steps in pair))
    scale, _ = apply(to_dtype(scales, wide), 1.0, 0.0)
    kept = stays(scale, operator_weight.dtype)

    def of_operator(factor: Tensor | float, *, needs_input: bool, needs_weight: bool) -> Any:
        narrow = _times_channel(grad_output, factor).to(operator_weight.dtype)
        return conv.backward(narrow, input, operator_weight, needs_input=needs_input, needs_weight=needs_weight)

    needs_weight = needs.weight or bool(products)
    grad_input, grad_folded = of_operator(kept, needs_input=needs.input and in_weight, needs_weight=needs_weight)
    if not in_weight:
        grad_input, _ = of_operator(scale, needs_input=needs.input, needs_weight=False)
    grad_weight = grad_bias = None
    if needs.weight:
        grad_weight = _scaled(grad_folded.to(wide), _over(scale, kept), conv=conv, channels=grad_output.shape[1])
    grad_shift = grad_output.sum([0, *range(2, grad_output.dim())], dtype=wide)
    if needs.bias:
        grad_bias = grad_shift * scale
    if not products:
        return grad_input, grad_weight, grad_bias, []
    inner = _over(sum_over_output_channel(grad_folded.to(wide) * weight.to(wide), conv), kept)
    return grad_input, grad_weight, grad_bias, [_sum(inner, grad_shift, bias, *steps, wide) for steps in products]


def _sum(
    inner: Tensor, grad_shift: Tensor, bias: Tensor | None, affine: Steps, scaling: Steps, wide: torch.dtype
) -> Tensor:
    """Sum of (q . g) * (p . (w (*) x + b) + a), from <dW', w>_c and g'."""
    p, a = apply(to_dtype(affine, wide), 1.0, 0.0 if bias is None else bias.to(wide))
    q, _ = apply(to_dtype(scaling, wide), 1.0, 0.0)
    total = times(plus(times(inner, p), times(grad_shift, a)), q)
    return total if isinstance(total, Tensor) else torch.full_like(grad_shift, total)


def _scaled(weight: Tensor, scale: Tensor | float, *, conv: LinearParams, channels: int) -> Tensor:
    if isinstance(scale, Tensor):
        return scale_output_channels(weight, scale.expand(channels), conv)
    return weight if scale == 1 else weight * scale


def _over(value: Any, divisor: Tensor | float) -> Any:
    """The quotient, without a node for a divisor that is the number 1."""
    return value if isinstance(divisor, float) and divisor == 1 else value / divisor


def _times_channel(grad: Tensor, factor: Tensor | float) -> Tensor:
    if isinstance(factor, Tensor):
        return grad * factor.reshape(-1, *(1,) * (grad.dim() - 2))
    return grad if factor == 1 else grad * factor


def _wide(weight: Tensor, *chains: Steps) -> torch.dtype:
    """The widest dtype of the weight and the steps, at least float32."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    for step in (step for steps in chains for step in steps):
        dtype = torch.promote_types(dtype, step.operand.dtype) if isinstance(step.operand, Tensor) else dtype
    return dtype


# --- where it applies ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """A region that can be folded.

    Attributes:
        adjoint: the operator's own gradients, if backward reads its output; else they are left as they are.
        links: from g down to the gradient that the adjoint reads, then to that of each product; none if there is
            no product.
        fits: s . (w (*) x) can be computed in the operator's dtype; not if that is float16 and the map's is wider.
    """

    region: Region
    adjoint: Adjoint | None
    links: tuple[Link, ...]
    fits: bool

    @property
    def needs(self) -> Needs:
        """The gradients that the graph reads."""
        adjoint = self.adjoint
        if adjoint is None:
            return Needs(input=False, weight=False, bias=False)
        gradients = (adjoint.grad_input, adjoint.grad_weight, adjoint.grad_bias)
        return Needs(*(gradient is not None for gradient in gradients))


def match(region: Region, gradients: Gradients, written: Collection[Node] = ()) -> Match | NoMatch:
    """The match of a region, or why there is none.

    Args:
        region: what the graph makes of an operator's output.
        gradients: the nodes that are made of tangents.
        written: the inputs that forward writes to.
    """
    op, output = region.op, region.output
    if output is None or _torch.is_backward(output.node):
        return NoMatch("nothing reads its output")
    if not value(op.node).is_floating_point():
        return NoMatch(f"the {op.name} computes in {value(op.node).dtype}")
    if region.last_scale is None:
        return NoMatch(f"the {op.name}'s output is also read by {', '.join(region.readers)}")
    if not op.params.is_static:
        return NoMatch(f"the {op.name}'s stride, padding or dilation is computed in the graph")
    fits = value(op.node).dtype is not torch.float16 or value(output.node).dtype is torch.float16
    if not region.products:
        wider = NoMatch(f"the {op.name} computes in float16, whose range s . w would leave, and the scale is wider")
        return Match(region, None, (), fits) if fits else wider
    if op.bias is not None and before_cast(op.bias) in written:
        return NoMatch(f"forward changes the {op.name}'s bias in place, which backward would read")
    adjoints: Sequence[Adjoint | None] = op.adjoints() or [None]
    for adjoint in adjoints:
        links = _common_gradient(region, adjoint, gradients)
        if links:
            return Match(region, adjoint, links, fits)
    return NoMatch(f"backward reads the {op.name}'s output with a gradient that is not that of its own backward")


def _common_gradient(region: Region, adjoint: Adjoint | None, gradients: Gradients) -> tuple[Link, ...]:
    """The nearest gradient of which what the adjoint and all products read are per-channel multiples."""
    start = region.affines[region.op.node].layout
    own = [] if adjoint is None else [list(upwards(adjoint.grad_output, start, gradients))]
    chains = own + [list(upwards(product.gradient, product.affine.layout, gradients)) for product in region.products]
    common = []
    for link in chains[0]:
        links = [other for chain in chains for other in chain if other.node is link.node]
        if len(links) == len(chains) and all(other.layout.same_as(link.layout) for other in links):
            common.append(links)
    if adjoint is None:  # then g must lie as the output does
        common = [links for links in common if not links[0].layout.moves]
    return tuple(_before_widening(common, value(region.op.node).dtype)) if common else ()


def _before_widening(common: list[list[Link]], dtype: torch.dtype) -> list[Link]:
    """The nearest; or what it is a cast of, if that has the operator's dtype already."""
    nearest, *others = common
    cast = nearest[0].node.target is convert_element_type
    return others[0] if cast and others and value(others[0][0].node).dtype == dtype else nearest


# --- the splice ----------------------------------------------------------------------------------------------------


def rewrite(found: Match, *, in_weight: bool = True) -> None:
    """Replace the left sides by the right sides in the graph; what is left of the old nodes is dead.

    Args:
        found: the match.
        in_weight: put the scales into the weight. If not, forward stays as it is, and in backward only what reads the
            output is replaced.
    """
    if in_weight:
        _rewrite_forward(found)
    if found.region.products:
        _rewrite_backward(found, in_weight=in_weight)


def _rewrite_forward(found: Match) -> None:
    op, output = found.region.op, found.region.output
    assert output is not None
    folded_weight, shift = _splice_fold(op, output.all_steps(), before=output.node)
    (new,) = splice(partial(forward, conv=op.params), op.input, folded_weight, shift, before=output.node)
    assert new is not None
    for affine in found.region.way:
        if affine.node.target in REAPPLIED:
            new = reapply(affine.node, new, before=output.node)
        for size in found.region.sizes:
            size.replace_input_with(affine.node, new)
    replace(output.node, new)


def _splice_fold(op: LinearOperator, steps: Steps, *, before: Node, in_backward: bool = False) -> list[Node | None]:
    """Insert c . w and the shift, to be computed again in backward rather than saved."""
    nodes, conv = operands(steps), op.params
    channels, dtype = value(op.node).shape[1], value(op.weight).dtype

    def of_tensors(weight: Tensor, bias: Tensor | None, *tensors: Tensor) -> Any:
        given = with_tensors(steps, dict(zip(nodes, tensors, strict=True)))
        return fold(weight, bias, given, conv=conv, channels=channels, dtype=dtype, in_backward=in_backward)

    return splice(of_tensors, *_parameters(op), *nodes, before=before, recompute=True)


def _parameters(op: LinearOperator) -> tuple[Node, Node | None]:
    """Weight and bias before autocast's cast."""
    return before_cast(op.weight), None if op.bias is None else before_cast(op.bias)


def _rewrite_backward(found: Match, *, in_weight: bool) -> None:
    op, adjoint, products = found.region.op, found.adjoint, found.region.products
    if adjoint is None:
        own, others = Link(found.links[0].node, found.links[0].layout), list(found.links)
        place = max(product.total for product in products)
    else:
        own, *others = found.links
        place = adjoint.node
    gradient = own.node
    operator_weight: Node | None = op.weight
    for move in own.moves:
        gradient = reapply(move, gradient, before=place)
    if found.needs.input and own.scales and in_weight:
        operator_weight, _ = _splice_fold(op, own.scales, before=place, in_backward=True)
    pairs = [(product.affine.all_steps(), link.scales) for product, link in zip(products, others, strict=True)]
    nodes = operands(own.scales, *(steps for pair in pairs for steps in pair))

    def of_tensors(grad: Any, input: Any, weight: Any, bias: Any, folded: Any, *tensors: Tensor) -> Any:
        given = dict(zip(nodes, tensors, strict=True))
        bound = [(with_tensors(affine, given), with_tensors(scaling, given)) for affine, scaling in pairs]
        scales, conv = with_tensors(own.scales, given), op.params
        *gradients, sums = backward(
            grad, input, weight, bias, folded, scales, bound, conv=conv, needs=found.needs, in_weight=in_weight
        )
        if adjoint is not None and adjoint.weight_is_transposed and gradients[1] is not None:
            gradients[1] = gradients[1].t()
        totals = [total.reshape(value(product.total).shape) for total, product in zip(sums, products, strict=True)]
        return *gradients, *totals

    new = splice(of_tensors, gradient, op.input, *_parameters(op), operator_weight, *nodes, before=place)
    old = (None, None, None) if adjoint is None else (adjoint.grad_input, adjoint.grad_weight, adjoint.grad_bias)
    for old_gradient, new_gradient in zip((*old, *(product.total for product in products)), new, strict=True):
        if old_gradient is not None:
            assert new_gradient is not None
            replace(old_gradient, new_gradient)

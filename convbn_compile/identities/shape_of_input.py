"""Compute a convolution's input gradient without the input: of a frozen weight, nothing else reads it in backward.

    grad_input(g, w, x) = grad_input(g, w, e)      for any e of the shape and strides of x             (8)

    g  grad_output  [N, C_out, *spatial_out]       x, e  input  [N, C_in, *spatial]
    w  weight       [C_out, C_in/groups, *k], transposed: [C_in, C_out/groups, *k]

Legal because a convolution is linear in its input: its derivative is the same wherever it is taken. Exact bit for bit.
aten.convolution_backward takes x all the same, so that autograd and Inductor keep it for the sake of its shape. e is
memory that nothing is written to, for as long as the operator runs.
Does not apply if: the weight's gradient is wanted; x is given, or kept anyway; or a size is not known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from convbn_compile._aten import ConvParams, aten, bind, is_kept
from convbn_compile._splice import splice


def before(grad_output: Tensor, input: Tensor, weight: Tensor, conv: ConvParams) -> Tensor | None:
    """grad_input(g, w, x)."""
    return conv.backward(grad_output, input, weight, needs_input=True, needs_weight=False)[0]


def after(grad_output: Tensor, input: Tensor, weight: Tensor, conv: ConvParams) -> Tensor | None:
    """grad_input(g, w, e)."""
    return before(grad_output, unwritten(input), weight, conv)


def unwritten(input: Tensor) -> Tensor:
    """Memory like a tensor's, that nothing is written to."""
    return torch.empty_strided(input.shape, input.stride(), dtype=input.dtype, device=input.device)


@dataclass(frozen=True)
class Match:
    """A convolution_backward that reads its input for the shape, and that input."""

    node: Node
    input: Node


def match(node: Node) -> Match | None:
    """The match that `node`, a convolution_backward, gives; None if it is none."""
    if node.target is not aten.convolution_backward.default:
        return None
    arguments = bind(node)
    source = arguments["input"]
    if arguments["output_mask"][1] or source.op == "placeholder" or is_kept(source):
        return None
    return Match(node, source)


def rewrite(found: Match) -> None:
    """Let the convolution_backward read unwritten memory."""
    (memory,) = splice(unwritten, found.input, before=found.node, recompute=True)
    assert memory is not None
    found.node.update_arg(1, memory)

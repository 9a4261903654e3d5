"""Add the outputs of parallel convolutions of one input by adding their weights: re-parameterisation, in the graph.

    sum over k of w_k (*) x = W (*) x,   W = sum over k of pad(w_k)                           (5)

and, with g a grad_output,

    sum over k of grad_input(g, w_k)  = grad_input(g, W)
    grad_weight(g, x) for w_k         = crop(grad_weight(g, x) for W)

    x  input  [N, C_in, *spatial]      w_k  weight  [C_out, C_in/groups, *k_k], transposed: [C_in, C_out/groups, *k_k]
    W  weight with the largest kernel in each axis

x itself is the output of a convolution whose weight is the identity matrix, [C, C/groups, 1, ...].
Legal because a convolution is linear in its weight, and because zeros around a kernel move it no further than the
padding that they make up for: entry j of a kernel reads the input at stride * o - padding + dilation * j, which is one
place for entry j of w_k and entry j + (P - p_k) / dilation of W.
Exact in real arithmetic; in floating point the weights are added in the wide dtype and rounded once.
Does not apply if: stride, groups or transposed differ, or dilation where both kernels have more than one entry; or the
kernels lie on different places, so that the zeros before and after would not be as many.
Source: Ding et al., RepVGG, arXiv 2101.03697, section 3.3, for inference; Vasu et al., MobileOne, arXiv 2206.04040.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convbn_compile._aten import ConvParams, LinearParams
from convbn_compile.identities.crop_of_pad import crop


@dataclass(frozen=True)
class Branch:
    """A convolution that is added to others, or, without params, the input itself."""

    params: ConvParams | None
    kernel: tuple[int, ...]


@dataclass(frozen=True)
class Merged:
    """One operator in place of several; a linear layer is alone.

    Attributes:
        params: its stride, padding, ...
        kernel: the size of its kernel.
        pads: the zeros around each branch's kernel, as torch.nn.functional.pad takes them.
    """

    params: LinearParams
    kernel: tuple[int, ...]
    pads: tuple[tuple[int, ...], ...]


def merge(branches: Sequence[Branch]) -> Merged | str:
    """The convolution that has all the branches in it, or why there is none."""
    first, *others = [branch.params for branch in branches if branch.params is not None]
    for name in ("stride", "groups", "transposed", "output_padding"):
        if any(getattr(other, name) != getattr(first, name) for other in others):
            return f"they differ in {name}"
    if len(others) + 1 < len(branches) and (first.transposed or set(first.stride) != {1}):
        return "the input itself is added to a convolution that is strided or transposed"
    axes = [_axis(branches, axis) for axis in range(len(first.stride))]
    if None in axes:
        return "their kernels lie on different places"
    padding, dilation, kernel, zeros = zip(*(axis for axis in axes if axis is not None), strict=True)
    pads = tuple(tuple(zero for axis in reversed(zeros) for zero in (axis[k], axis[k])) for k in range(len(branches)))
    return Merged(replace(first, padding=padding, dilation=dilation), kernel, pads)


def _axis(branches: Sequence[Branch], axis: int) -> tuple[int, int, int, list[int]] | None:
    """Padding, dilation and kernel size of one axis, and the zeros on either side of each branch's kernel."""
    sizes = [branch.kernel[axis] for branch in branches]
    paddings = [0 if branch.params is None else branch.params.padding[axis] for branch in branches]
    wide = [branch.params.dilation[axis] for branch in branches if branch.params and branch.kernel[axis] > 1]
    dilation, padding = (wide or [1])[0], max(paddings)
    zeros = [(padding - own) // dilation for own in paddings]
    size = sizes[0] + 2 * zeros[0]
    aligned = [padding - own == dilation * zero for own, zero in zip(paddings, zeros, strict=True)]
    equal = [own + 2 * zero == size for own, zero in zip(sizes, zeros, strict=True)]
    return (padding, dilation, size, zeros) if all(aligned + equal) and len(set(wide)) <= 1 else None


def before(input: Tensor, weights: Sequence[Tensor | None], branches: Sequence[Branch]) -> Tensor:
    """The sum of the outputs; the weight of the input itself is None."""
    return sum(
        input if weight is None or branch.params is None else branch.params.forward(input, weight)
        for weight, branch in zip(weights, branches, strict=True)
    )  # type: ignore[return-value]


def after(input: Tensor, weights: Sequence[Tensor | None], merged: Merged) -> Tensor:
    """W (*) x."""
    one = identity(input.new_ones(input.shape[1]), merged)
    return merged.params.forward(input, add([one if weight is None else weight for weight in weights], merged))


def add(weights: Sequence[Tensor | None], merged: Merged, computed: Sequence[bool] | None = None) -> Tensor:
    """W, without those branches that have None; what needs the same zeros around it is added up first.

    A kernel is added to a part of the largest rather than to all of it, with zeros around: of that Inductor makes a
    loop over single entries on CPUs, and of index_add one that writes out of bounds (torch 2.13).

    Args:
        weights: w_k.
        merged: the operator.
        computed: which of them are nobody else's, so that they are no part of a larger tensor; none if not given.
    """
    sums: dict[tuple[int, ...], tuple[Tensor, bool]] = {}
    for weight, pad, own in zip(weights, merged.pads, computed or [False] * len(weights), strict=True):
        if weight is not None:
            sums[pad] = (sums[pad][0] + weight, True) if pad in sums else (weight, own)
    (pad, (total, own)), *others = sorted(sums.items(), key=lambda item: any(item[0]))
    if any(pad):
        total, own = torch.nn.functional.pad(total, pad), True
    for pad, (weight, _) in others:
        total = _add_inside(total, weight, pad) if own else total + torch.nn.functional.pad(weight, pad)
        own = True
    return total


def _add_inside(total: Tensor, weight: Tensor, pad: Sequence[int]) -> Tensor:
    """The sum of a weight, which starts where its memory does, and a smaller one that has so many zeros around it."""
    offset = sum(zeros * stride for zeros, stride in zip(reversed(pad[::2]), total.stride()[2:], strict=True))
    inside = weight.shape, total.stride(), offset
    return torch.as_strided_scatter(total, total.as_strided(*inside) + weight, *inside)


def identity(ones: Tensor, merged: Merged) -> Tensor:
    """The weight [C, C/groups, 1, ...] of a convolution whose output is its input; `ones` is [C]."""
    matrix = _eye(ones, merged)
    return matrix.reshape(*matrix.shape, *(1 for _ in merged.kernel))


def diagonal(weight: Tensor, merged: Merged) -> Tensor:
    """What of a weight [C, C/groups, 1, ...] multiplies channel c by itself: [C]."""
    matrix = weight.reshape(weight.shape[0], -1)
    return (matrix * _eye(matrix, merged)).sum(1)


def _eye(like: Tensor, merged: Merged) -> Tensor:
    """Row c has its one where the channel c stands in the group: [C, C/groups]."""
    channels = like.shape[0]
    per_group = channels // merged.params.groups
    row, column = torch.arange(channels, device=like.device), torch.arange(per_group, device=like.device)
    return (row.reshape(-1, 1) % per_group == column).to(like.dtype)


def take(weight: Tensor, merged: Merged, branch: int) -> Tensor:
    """crop(W): the entries of a weight, or of its gradient, that stand where those of a branch's weight do."""
    return crop(weight, merged.pads[branch])

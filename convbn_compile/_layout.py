"""How a tensor's elements lie after views and permutations, and where its channel axis is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from convbn_compile import _torch
from convbn_compile._aten import aten, value

Sizes = Sequence[Any]


@dataclass(frozen=True)
class Layout:
    """How the elements of a tensor lie, compared with the tensor that one started from.

    Attributes:
        sizes: the tensor's.
        axis: which of its axes is the channels'.
        moves: the views and permutations that lead here, each with the sizes before it; none twice in a row.
    """

    sizes: Sizes
    axis: int
    moves: tuple[tuple[Sizes | None, Sizes], ...] = ()

    def view(self, sizes: Sizes) -> Layout | None:
        """What a view of these sizes leads to; None if the channels do not keep an axis of their own."""
        behind = math.prod(self.sizes[self.axis + 1 :])
        for axis, size in enumerate(sizes):
            same = _torch.same_size(size, self.sizes[self.axis])
            if same and _torch.same_size(math.prod(sizes[axis + 1 :]), behind):
                return self._moved(None, sizes, axis)
        return None

    def permute(self, dims: Sequence[int]) -> Layout:
        """What a permutation leads to."""
        dims = [dim % len(self.sizes) for dim in dims]
        return self._moved(dims, [self.sizes[dim] for dim in dims], dims.index(self.axis))

    def unpermute(self, dims: Sequence[int]) -> Layout:
        """What a permutation leads here from."""
        dims = [dim % len(self.sizes) for dim in dims]
        return self.permute([dims.index(index) for index in range(len(dims))])

    def _moved(self, dims: Sequence[int] | None, sizes: Sizes, axis: int) -> Layout:
        """Add a permutation, or a view if `dims` is None, to the moves, or merge it with the last one."""
        moves, before = self.moves, self.sizes
        if moves and (moves[-1][0] is None) == (dims is None):
            last, before = moves[-1]
            dims = dims if last is None or dims is None else [last[dim] for dim in dims]
            moves = moves[:-1]
        idle = same_sizes(before, sizes) if dims is None else list(dims) == list(range(len(dims)))
        return Layout(sizes, axis, moves if idle else (*moves, (dims, before)))

    def same_as(self, other: Layout) -> bool:
        """True if elements at one place in both stand at one place in the tensors that both started from."""
        pairs = list(zip(self.moves, other.moves, strict=False))
        return (
            len(self.moves) == len(other.moves)
            and same_sizes(self.sizes, other.sizes)
            and all(mine[0] == theirs[0] and same_sizes(mine[1], theirs[1]) for mine, theirs in pairs)
        )

    def is_per_channel(self, operand: Any) -> bool:
        """True if `operand` is a finite number, or a tensor that broadcasts to `sizes` and varies only along `axis`."""
        if not isinstance(operand, Node) or not isinstance(operand.meta.get("val"), Tensor):
            return isinstance(operand, (int, float)) and math.isfinite(operand)
        sizes = value(operand).shape
        first = len(self.sizes) - len(sizes)
        if first < 0:
            return False
        return all(
            _torch.same_size(size, 1) or (index == self.axis and _torch.same_size(size, self.sizes[index]))
            for index, size in enumerate(sizes, first)
        )

    @property
    def others(self) -> set[int]:
        """Every axis but the channels'."""
        return set(range(len(self.sizes))) - {self.axis}


def same_sizes(first: Sizes, second: Sizes) -> bool:
    """True if two shapes are known to be equal."""
    return len(first) == len(second) and all(map(_torch.same_size, first, second))


REAPPLIED = frozenset(
    {
        aten.clone.default,
        aten.permute.default,
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
    }
)
"""The operators that move elements or copy them, and compute nothing."""


def after(layout: Layout, node: Node) -> Layout | None:
    """The layout of `node`, one of REAPPLIED, if its input has `layout`."""
    if node.target is aten.clone.default:
        return layout
    return layout.permute(node.args[1]) if node.target is aten.permute.default else layout.view(value(node).shape)  # type: ignore[arg-type]


def before(layout: Layout, node: Node) -> Layout | None:
    """The layout of the input of `node`, one of REAPPLIED, if `node` has `layout`."""
    source = node.args[0]
    assert isinstance(source, Node)
    if node.target is aten.clone.default:
        return layout
    return layout.unpermute(node.args[1]) if node.target is aten.permute.default else layout.view(value(source).shape)  # type: ignore[arg-type]

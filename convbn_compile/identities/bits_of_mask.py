"""Save a mask that backward reads as bits: an eighth of its booleans, and 1/32 of the float32 activation it is made of.

    m = unpack(pack(m)),   pack(m) = sum over k < 8 of 2^k m_k                                (9)

    m       booleans, any shape with an axis whose size is a multiple of 8; m_k the k-th eighth along that axis
    pack(m) uint8, that axis an eighth

Legal because every number below 256 has its own bits; the sum is taken in float32, which has them all, since that is
what CPUs vectorise. Exact.
Where a convolution is frozen, its input is saved for the activation before only, and of a ReLU's output only the sign
matters (8); so it is with an activation before pooling. Inductor then keeps booleans, a byte each, which it reads and
writes one by one on CPUs.
Does not apply if: no axis but the batch is a multiple of 8; what the mask compares is given, kept for a convolution,
read by backward otherwise, or computed again by the user's checkpoint.
Whether the bits or something else is saved remains the partitioner's choice: they can be made again in backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial, reduce
from operator import add

import torch
from torch import Tensor
from torch.fx import Node

from convbn_compile import _torch
from convbn_compile._aten import aten, convert_element_type, is_kept, value
from convbn_compile._splice import reconnect, splice


def before(mask: Tensor) -> Tensor:
    """M."""
    return mask


def after(mask: Tensor, axis: int) -> Tensor:
    """unpack(pack(m))."""
    return unpack(pack(mask, axis), axis)


def pack(mask: Tensor, axis: int) -> Tensor:
    """Eight booleans as one number: uint8 [..., size / 8, ...] of bool [..., size, ...]."""
    sizes = mask.shape
    eighths = mask.reshape(*sizes[:axis], 8, sizes[axis] // 8, *sizes[axis + 1 :]).unbind(axis)
    total: Tensor = reduce(add, (eighth.to(torch.float32) * 2.0**k for k, eighth in enumerate(eighths)))
    return total.to(torch.uint8)


def unpack(bits: Tensor, axis: int) -> Tensor:
    """The inverse of pack."""
    values = 2 ** torch.arange(8, dtype=torch.int32, device=bits.device).reshape(8, *(1,) * (bits.dim() - axis))
    return (bits.to(torch.int32).unsqueeze(axis) & values).ne(0).flatten(axis, axis + 1)


@dataclass(frozen=True)
class Match:
    """A mask, the nodes that make it of what it compares, in order, and where backward reads it."""

    mask: Node
    made_by: tuple[Node, ...]
    readers: tuple[Node, ...]
    axis: int

    @property
    def compared(self) -> set[Node]:
        """What is compared."""
        return {source for node in self.made_by for source in node.all_input_nodes} - {*self.made_by}


def match(node: Node) -> Match | None:
    """The match that `node`, a mask, gives; None if it is none."""
    if node.target not in (*_COMPARISONS, *_COMBINATIONS):
        return None
    readers = tuple(user for user in node.users if user.target is aten.where.self and _torch.is_backward(user))
    axis = _axis(node)
    if not readers or axis is None:
        return None
    found = Match(node, _made_by(node), readers, axis)
    return found if all(map(_is_for_masks, found.compared)) else None


def rewrite(found: Match) -> None:
    """Make the bits where forward has what the mask compares, and the mask of the bits where backward reads it."""
    place = max(found.compared)
    for node in found.made_by:
        if place < node:
            place.append(node)
            place = node
    (bits,) = splice(partial(pack, axis=found.axis), found.mask, before=place.next, like=place)
    (mask,) = splice(partial(unpack, axis=found.axis), bits, before=min(found.readers))
    assert mask is not None
    reconnect(found.readers, found.mask, mask)


def _axis(mask: Node) -> int | None:
    """The first axis that eight fit into; of the batch, by whose size saved bytes would jump, none."""
    sizes = value(mask).shape
    return next((axis for axis in range(1, len(sizes)) if _torch.is_multiple(sizes[axis], 8)), None)


def _made_by(mask: Node) -> tuple[Node, ...]:
    """The comparisons with numbers that a mask is made of, and what combines them, in order."""
    queue = [mask]
    for node in queue:
        if node.target in _COMBINATIONS:
            queue += [source for source in node.all_input_nodes if source.target in (*_COMPARISONS, *_COMBINATIONS)]
    return tuple(sorted(set(queue)))


def _is_for_masks(node: Node) -> bool:
    """True if backward has no other use for what a mask compares."""
    while _is_the_same(node):
        node = node.all_input_nodes[0]
    if node.op == "placeholder" or _torch.is_backward(node) or "recompute" in node.meta or is_kept(node):
        return False
    return all(reader.target in _COMPARISONS for reader in _readers_in_backward(node))


def _readers_in_backward(node: Node) -> Iterator[Node]:
    """What reads the node, or a view or cast of it, in backward."""
    for user in node.users:
        if _is_the_same(user):
            yield from _readers_in_backward(user)
        elif _torch.is_backward(user):
            yield user


def _is_the_same(node: Node) -> bool:
    """True for a view or cast: whoever has what it is of has it, too."""
    return _torch.is_view(node) or node.target is convert_element_type


_COMPARISONS = frozenset(getattr(aten, name).Scalar for name in ("le", "lt", "ge", "gt", "eq", "ne"))
_COMBINATIONS = frozenset(
    {
        aten.bitwise_or.Tensor,
        aten.bitwise_and.Tensor,
        aten.bitwise_not.default,
        aten.logical_or.default,
        aten.logical_and.default,
        aten.logical_not.default,
    }
)

"""Read a tensor from its padded copy in backward, where a convolution keeps the copy anyway.

    x = crop(pad(x, p), p),   p >= 0                                                          (7)

    x  input  any shape                p  pad  two numbers for each of the last dimensions, the last one first

Legal because padding keeps every entry and cropping takes away what it added. Exact bit for bit.
Networks with "same" padding of their own convolve pad(x): the copy is saved for the weight's gradient, and x, or a mask
made of it, would be saved beside it for the activation before.
Does not apply if: a pad is negative or computed in the graph; a gradient is padded; no convolution keeps the copy;
nothing in backward reads x; or a convolution does, so that x is kept anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from convbn_compile import _torch
from convbn_compile._aten import aten, bind, is_kept
from convbn_compile._splice import reconnect, splice


def before(input: Tensor, pad: tuple[int, ...]) -> Tensor:  # noqa: ARG001  the two sides take the same
    """X."""
    return input


def after(input: Tensor, pad: tuple[int, ...]) -> Tensor:
    """crop(pad(x, p), p)."""
    return crop(torch.nn.functional.pad(input, pad), pad)


def crop(padded: Tensor, pad: tuple[int, ...]) -> Tensor:
    """What was padded: a view."""
    for index in range(len(pad) // 2):
        first, last = pad[2 * index : 2 * index + 2]
        if first or last:
            padded = aten.slice.Tensor(padded, -1 - index, first, -last or None)
    return padded


@dataclass(frozen=True)
class Match:
    """A padded copy that a convolution keeps for backward, and what else in backward reads its original."""

    padded: Node
    pad: tuple[int, ...]
    readers: tuple[Node, ...]


def match(node: Node) -> Match | None:
    """The match that `node`, a constant_pad_nd, gives; None if it is none."""
    if node.target is not aten.constant_pad_nd.default or _torch.is_backward(node):
        return None
    arguments = bind(node)
    pad = tuple(arguments["pad"])
    if not any(pad) or not all(isinstance(number, int) and number >= 0 for number in pad):
        return None
    readers = tuple(user for user in arguments["self"].users if _torch.is_backward(user))
    return Match(node, pad, readers) if readers and is_kept(node) and not is_kept(arguments["self"]) else None


def rewrite(found: Match) -> None:
    """Let the readers in backward read the crop."""
    first = min(found.readers)
    (cropped,) = splice(partial(crop, pad=found.pad), found.padded, before=first)
    assert cropped is not None
    reconnect(found.readers, bind(found.padded)["self"], cropped)

"""What is seen to while a side-tuned network runs: what blocks get, and what they return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from convbn_compile import _torch
from convbn_compile._runs import hooks_of
from convbn_compile.side_tuning._blocks import Block
from convbn_compile.side_tuning._side_network import Part
from convbn_compile.side_tuning._tap import Factors, Tap


def version(tensor: Tensor) -> int | None:
    """Of what is in a tensor; None where it is not counted."""
    return None if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def check_input(block: Block, x: Any) -> None:
    """Of a block that gets no sum.

    Raises:
        RuntimeError: it is no tensor.
    """
    if not isinstance(x, Tensor):
        raise RuntimeError(f"{block.path} is side-tuned and gets a tensor, but got {type(x).__name__}.")


def check_hooks(block: Block) -> None:
    """Of a block that gets a sum or hands one on.

    Raises:
        RuntimeError: it has hooks.
    """
    hooks = hooks_of(block.module)
    if hooks:
        raise RuntimeError(
            f"{block.path} is side-tuned and has hooks ({', '.join(hooks)}), which would get what blocks hand "
            "on, no tensor. Remove them, or register them on what is inside of the block, or on its stage."
        )


def check_sums(message: object, parts: Sequence[Part | None], sums: Sequence[Factors | None]) -> None:
    """Of what was handed on, where there is a graph.

    Raises:
        RuntimeError: the sum was computed without one, so that no gradient would reach the taps before.
    """
    for part, factors in zip(parts, sums, strict=True):
        if part is not None and factors is not None and part.tap.c.weight.requires_grad and not factors.c.requires_grad:
            raise RuntimeError(f"{message} Here the blocks before ran without a graph, as in a reentrant checkpoint.")


def check_width(block: Block, tap: Tap, z: Tensor) -> None:
    """Of what a tap reads.

    Raises:
        ValueError: it has another number of channels than the block's first layer said.
    """
    if z.shape[tap.channels] != tap.width:
        raise ValueError(
            f"{block.path} was taken to get {tap.width} channels in dimension {tap.channels}, by its first layer, but "
            f"got {tuple(z.shape)}. Leave it out of attach's blocks."
        )


def check_frozen(block: Block, z: Tensor, others: Any) -> None:
    """Of a block that runs without a graph.

    Raises:
        ValueError: gradients should go through it.
    """
    if z.requires_grad:
        what = f"the input of {block.path} requires grad"
    elif any(parameter.requires_grad for parameter in block.module.parameters()):
        what = f"parameters of {block.path} require grad"
    elif any(tensor.requires_grad for tensor in _torch.tensors_in(others)):
        what = f"a tensor among the other arguments of {block.path} requires grad"
    else:
        return
    raise ValueError(
        f"{what}, but it is frozen and runs without a graph. Do not train what is before it, nor the images, and see "
        "to it that head= is behind; or attach with a smaller start."
    )


def check_output(block: Block, z: Tensor, found: Any, before: int | None) -> None:
    """Of a block that is tapped.

    Args:
        block: the block.
        z: what it got.
        found: what it returned.
        before: the version of z before it ran.

    Raises:
        ValueError: it has another shape; z was modified.
    """
    if not isinstance(found, Tensor) or found.shape != z.shape:
        made = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"{block.path} makes {made} of {tuple(z.shape)}, but a block that is tapped returns a tensor of the same "
            "shape. Leave it out of attach's blocks."
        )
    if before is not None and version(z) != before:
        raise ValueError(
            f"{block.path} modifies its input in place, which its tap needs in backward. Set inplace=False on its "
            "first activation, or leave it out of attach's blocks."
        )

"""A frozen network that side networks tap: the forwards of its blocks, set on the modules; and back again."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from convbn_compile._runs import HandedOn
from convbn_compile.side_tuning._blocks import Block
from convbn_compile.side_tuning._side_network import SideNetwork

Sums = tuple["Tensor | None", ...]
"""h of each task."""

MESSAGE = (
    "{} is side-tuned: it gets what the block before it handed on, features and the side network's sum, and only the "
    "last block of a stage returns a tensor. For features from between blocks, layer drop or reentrant checkpoints "
    "detach() gives the original model back."
)


class Installed:
    """Side networks of one or more tasks at the blocks of one network.

    Up to the first block that a task adapts all tasks have the same features, which are computed once; behind it the
    batch is that of the first task, then that of the second, and so on.

    Args:
        blocks: all.
        adapted: the number of the first one whose output is adapted. It and those before run without a graph.
        sides: of each task; they are children of the model.
    """

    def __init__(self, blocks: Sequence[Block], adapted: int, sides: Sequence[SideNetwork]) -> None:
        self.blocks, self.adapted, self.sides = tuple(blocks), adapted, tuple(sides)
        self.tapped = [any(side.taps_block(block.index) for side in sides) for block in blocks]
        for block in blocks:
            block.module.__dict__["forward"] = partial(self.call, block.index)

    def remove(self) -> None:
        """All is as it was."""
        for block in self.blocks:
            del block.module.__dict__["forward"]

    def call(self, index: int, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The forward of the block of this number.

        Raises:
            RuntimeError: it gets something else than the block before it returned.
            ValueError: a frozen block has something to train; a block that is tapped changes its input, or its shape.
        """
        z, sums = self._received(index, x)
        if not self.tapped[index]:
            return self._frozen(index, z, args, kwargs)
        version = _version(z)
        sums = self._gathered(index, z, sums)
        found = self._frozen(index, z, args, kwargs)
        self._check(index, z, found, version)
        adapted = self._adapted(index, found, sums)
        hands_on = self._follows(index + 1)
        return HandedOn((adapted, sums), index, self._message(index + 1)) if hands_on else adapted

    def _received(self, index: int, x: Any) -> tuple[Tensor, Sums]:
        if self._follows(index):
            if not isinstance(x, HandedOn) or x.at != index - 1:
                raise RuntimeError(f"{self._message(index)} Here it got {type(x).__name__}.")
            z, sums = x.value
            return z, sums
        if not isinstance(x, Tensor):
            raise RuntimeError(
                f"{self.blocks[index].path} is side-tuned and gets a tensor, but got {type(x).__name__}."
            )
        return x, (None,) * len(self.sides)

    def _follows(self, index: int) -> bool:
        """Whether a block gets a sum from the one before it."""
        inside = 0 < index < len(self.blocks) and self.blocks[index].stage == self.blocks[index - 1].stage
        return inside and self.tapped[index - 1]

    def _gathered(self, index: int, z: Tensor, sums: Sums) -> Sums:
        pairs = zip(self.sides, self._by_task(z, common=index <= self.adapted), sums, strict=True)
        return tuple(side.gather(index, part, h) if side.taps_block(index) else None for side, part, h in pairs)

    def _frozen(self, index: int, z: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        block = self.blocks[index]
        before = index <= self.adapted
        if before and torch.is_grad_enabled():
            self._check_frozen(block, z)
        with torch.no_grad() if before else contextlib.nullcontext():
            return type(block.module).forward(block.module, z, *args, **kwargs)

    def _adapted(self, index: int, z: Tensor, sums: Sums) -> Tensor:
        if index < self.adapted:
            return z
        parts = self._by_task(z, common=index == self.adapted)
        found = [
            part if h is None else side.adapt(index, part, h)
            for side, part, h in zip(self.sides, parts, sums, strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _by_task(self, z: Tensor, *, common: bool) -> Sequence[Tensor]:
        tasks = len(self.sides)
        return [z] * tasks if common or tasks == 1 else z.chunk(tasks)

    def _message(self, index: int) -> str:
        return MESSAGE.format(self.blocks[index].path)

    def _check_frozen(self, block: Block, z: Tensor) -> None:
        if z.requires_grad:
            what = f"the input of {block.path} requires grad"
        elif any(parameter.requires_grad for parameter in block.module.parameters()):
            what = f"parameters of {block.path} require grad"
        else:
            return
        raise ValueError(
            f"{what}, but blocks up to {self.blocks[self.adapted].path} are frozen and run without a graph. Do not "
            "train what is before it, nor the images; or attach with a smaller start."
        )

    def _check(self, index: int, z: Tensor, found: Any, version: int | None) -> None:
        path = self.blocks[index].path
        if not isinstance(found, Tensor) or found.shape != z.shape:
            made = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"{path} makes {made} of {tuple(z.shape)}, but a block that is tapped returns a tensor of the same "
                "shape. Leave it out of attach's blocks."
            )
        if version is not None and _version(z) != version:
            raise ValueError(
                f"{path} modifies its input in place, which its tap needs in backward. Set inplace=False on its first "
                "activation, or leave it out of attach's blocks."
            )


def _version(tensor: Tensor) -> int | None:
    return None if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version

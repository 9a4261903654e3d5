"""One block of a side-tuned network: what its forward does."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convbn_compile._runs import HandedOn
from convbn_compile.side_tuning._blocks import Block
from convbn_compile.side_tuning._checks import (
    check_frozen,
    check_hooks,
    check_input,
    check_output,
    check_sums,
    check_width,
    version,
)
from convbn_compile.side_tuning._side_network import Part, SideNetwork
from convbn_compile.side_tuning._tap import Factors
from convbn_compile.side_tuning._watch import Watch

Sums = tuple["Factors | None", ...]
"""h of each task."""

MESSAGE = (
    "{} is side-tuned: it gets what the block before it handed on, features and the side network's sum, and only the "
    "last block of a stage returns a tensor. For features from between blocks, layer drop or reentrant checkpoints "
    "detach() gives the original model back."
)


class Step:
    """One block with its side networks.

    Args:
        block: the block.
        sides: of each task.
        watch: is told where it adapts.
        frozen: it runs without a graph, on features that all tasks have in common.

    Attributes:
        follows: it gets a sum from the block before it.
        after: the step that it hands a sum on to; None if it returns a tensor.
    """

    def __init__(self, block: Block, sides: Sequence[SideNetwork], watch: Watch, *, frozen: bool) -> None:
        self.block, self.watch, self.frozen = block, watch, frozen
        self.parts: tuple[Part | None, ...] = tuple(side.at(block.index) for side in sides)
        self.tapped = any(part is not None for part in self.parts)
        self.follows, self.after = False, None
        self.first = list(inspect.signature(type(block.module).forward).parameters)[1:2]

    after: Step | None

    @property
    def kind(self) -> tuple[Any, ...]:
        """What steps have in common that share graphs, where blocks are compiled one by one."""
        return self.block.stage, self.frozen, self.follows, self.after is None

    @property
    def message(self) -> str:
        """Of the error where somebody else comes between."""
        return MESSAGE.format(self.block.path)

    def run(self, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """The forward of the block.

        Raises:
            RuntimeError: it gets something else than the block before it returned; it got hooks.
            ValueError: a frozen block has something to train; a block that is tapped changes its input, or its shape.
        """
        if not args and self.first and self.first[0] in kwargs:
            args, kwargs = (kwargs[self.first[0]],), {name: kwargs[name] for name in kwargs if name != self.first[0]}
        z, sums = self._received(args[0] if args else None)
        if not self.tapped:
            return self._frozen(module, z, args[1:], kwargs)
        before = version(z)
        sums = self._gathered(z, sums)
        found = self._frozen(module, z, args[1:], kwargs)
        check_output(self.block, z, found, before)
        adapted = self._adapted(found, sums)
        return adapted if self.after is None else HandedOn((adapted, sums), self.after, self.after)

    def __str__(self) -> str:
        return self.message

    def _received(self, x: Any) -> tuple[Tensor, Sums]:
        if self.follows or self.after is not None:
            check_hooks(self.block)
        if not self.follows:
            check_input(self.block, x)
            return x, (None,) * len(self.parts)
        if not isinstance(x, HandedOn) or not (torch.compiler.is_compiling() or x.at is self):
            raise RuntimeError(f"{self.message} Here it got {type(x).__name__}.")
        z, sums = x.value
        if torch.is_grad_enabled():
            check_sums(self, self.parts, sums)
        return z, sums

    def _gathered(self, z: Tensor, sums: Sums) -> Sums:
        found: list[Factors | None] = []
        for part, own, before in zip(self.parts, self._by_task(z), sums, strict=True):
            if part is not None:
                check_width(self.block, part.tap, own)
            found.append(None if part is None else part.tap(own, before))
        return tuple(found)

    def _frozen(self, module: nn.Module, z: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if not self.frozen:
            return type(module).forward(module, z, *args, **kwargs)
        if torch.is_grad_enabled():
            check_frozen(self.block, z, (args, kwargs))
        with torch.no_grad():
            return type(module).forward(module, z, *args, **kwargs)

    def _adapted(self, z: Tensor, sums: Sums) -> Tensor:
        if not any(part is not None and part.adapts for part in self.parts):
            return z
        self.watch.adapts(self.block.path)
        found = [
            own if part is None or factors is None else part.adapted(own, factors)
            for part, own, factors in zip(self.parts, self._by_task(z), sums, strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _by_task(self, z: Tensor) -> Sequence[Tensor]:
        tasks = len(self.parts)
        return [z] * tasks if self.frozen or tasks == 1 else z.chunk(tasks)

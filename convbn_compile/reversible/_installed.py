"""A chain in the place of its blocks: the forward of the first of them runs all, the others hand on; and back again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from torch import Tensor

from convbn_compile._runs import HandedOn, check_untouched
from convbn_compile.reversible._chains import Found
from convbn_compile.reversible._unit import Shortcut


class Installed:
    """A run of blocks that is computed by `chain`; forwards are set on the modules themselves, names stay.

    Args:
        found: the run.
        chain: of the tensor that the first block gets, what the last one returns.

    Raises:
        ValueError: a block has hooks, or a forward of its own, which the chain would not call.
    """

    def __init__(self, found: Found, chain: Callable[[Tensor], Tensor]) -> None:
        self.chain = chain
        self.message = (
            f"The blocks from {found.paths[0]} to {found.paths[-1]} are a reversible chain and run as one: each is "
            "called with what the block before it returned, and with nothing else, and has no hooks. For features from "
            "inside of the chain, checkpoints or layer drop leave blocks out by the chains of make_reversible; "
            "restore() gives the original model back."
        )
        self.blocks = found.blocks
        for path, block in zip(found.paths, self.blocks, strict=True):
            check_untouched(
                path, block, "which a chain would not call. Remove them before, or leave the block out by chains."
            )
        slots = [(unit.module, unit.slot) for unit in found.units if unit.slot]
        self.projections = [(module, slot, getattr(module, slot)) for module, slot in slots]
        for module, slot, _ in self.projections:
            setattr(module, slot, Shortcut())
        for index, block in enumerate(self.blocks):
            block.__dict__["forward"] = partial(self.call, index)

    def remove(self) -> None:
        """All is as it was."""
        for block in self.blocks:
            del block.__dict__["forward"]
        for module, slot, projection in self.projections:
            setattr(module, slot, projection)

    def call(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """The forward of the block of this number.

        Raises:
            RuntimeError: it is called with something else than the block before it returned, or with more than that.
        """
        block = self.blocks[index]
        x = self._input(index, args, kwargs)
        if block._forward_hooks or block._forward_pre_hooks:
            self._refuse()
        if not index:
            output = self.chain(x) if isinstance(x, Tensor) else self._refuse()
        else:
            before = isinstance(x, HandedOn) and x.at == index - 1 and x.message is self.message
            output = x.value if before else self._refuse()
        last = index == len(self.blocks) - 1
        return output if last else HandedOn(output, index, self.message)

    def _input(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a block is called with, if all else is what its forward has for it anyway."""
        if len(args) == 1 and not kwargs:
            return args[0]
        signature = inspect.signature(type(self.blocks[index]).forward)
        try:
            given = signature.bind(self.blocks[index], *args, **kwargs).arguments
        except TypeError:
            self._refuse()
        _, x, *others = given
        if any(given[name] is not signature.parameters[name].default for name in others):
            self._refuse()
        return given[x]

    def _refuse(self) -> NoReturn:
        raise RuntimeError(self.message)

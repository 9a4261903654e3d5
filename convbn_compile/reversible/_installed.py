"""A chain in the place of its blocks: the forward of the first of them runs all, the others' hands on; and back."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor, nn

from convbn_compile.reversible._chains import Found, runs_its_children
from convbn_compile.reversible._unit import Shortcut


class Installed:
    """A run of blocks that is computed by `chain`; forwards are set on the modules themselves, names stay.

    The first block's forward is the chain, and the others hand on what they get, which has to be what the chain made.
    Where the parent does no more than call its children in turn, they do so in the parent's forward only: whoever
    goes through the blocks by himself, for what is between them, gets an error.

    Args:
        found: the run.
        chain: of the tensor that the first block gets, what the last one returns.

    Raises:
        ValueError: a block has hooks, or a forward of its own, which the chain would not call.
    """

    def __init__(self, found: Found, chain: Callable[[Tensor], Tensor]) -> None:
        self.found, self.chain = found, chain
        self.blocks = [found.parent.get_submodule(name) for name in found.names]
        for path, block in zip(found.paths, self.blocks, strict=True):
            _check(path, block)
        self.output: Callable[[], Tensor | None] = lambda: None
        self.projections = [
            (unit.module, unit.slot, getattr(unit.module, unit.slot)) for unit in found.units if unit.slot
        ]
        for module, slot, _ in self.projections:
            setattr(module, slot, Shortcut())
        self.inside, self.of_parent = False, found.parent.forward
        self.before = found.parent.__dict__.get("forward")
        other_run = isinstance(getattr(self.before, "__self__", None), Installed)
        self.in_parent = runs_its_children(found.parent) and (self.before is None or other_run)
        if self.in_parent:
            found.parent.__dict__["forward"] = self.forward_of_parent
        for block in self.blocks:
            block.__dict__["forward"] = self.first if block is self.blocks[0] else self.other

    def remove(self) -> None:
        """All is as it was; of two runs of one parent the later is removed first."""
        for block in self.blocks:
            del block.__dict__["forward"]
        if self.in_parent:
            del self.found.parent.__dict__["forward"]
            if self.before is not None:
                self.found.parent.__dict__["forward"] = self.before
        for module, slot, projection in self.projections:
            setattr(module, slot, projection)

    def forward_of_parent(self, *args: Any, **kwargs: Any) -> Any:
        """As ever; the blocks know that they are called from here."""
        self.inside = True
        try:
            return self.of_parent(*args, **kwargs)
        finally:
            self.inside = False

    def first(self, x: Tensor, **others: Any) -> Tensor:
        """What the last block returns."""
        if (self.in_parent and not self.inside) or not self.are_defaults(others):
            self.refuse()
        output = self.chain(x)
        self.output = weakref.ref(output)
        return output

    def other(self, x: Tensor, **others: Any) -> Tensor:
        """What the block gets, if the chain made it."""
        expected = x is self.output() and (self.inside or not self.in_parent) and self.are_defaults(others)
        if not expected:
            self.refuse()
        return x

    def are_defaults(self, arguments: dict[str, Any]) -> bool:
        """True if arguments beside x are what the blocks' forward has for them anyway."""
        known = inspect.signature(type(self.blocks[0]).forward).parameters
        return all(name in known and value is known[name].default for name, value in arguments.items())

    def refuse(self) -> NoReturn:
        """Of a block that is called by itself.

        Raises:
            RuntimeError: always.
        """
        first, last = self.found.paths[0], self.found.paths[-1]
        raise RuntimeError(
            f"A block of the reversible chain from {first} to {last} was called by itself, with something else than "
            "the block before it returned, or with more than that; the blocks run as one. For features from inside of "
            "the chain leave those blocks out of it, by the chains of make_reversible; restore() gives the original "
            "model back."
        )


def _check(path: str, block: nn.Module) -> None:
    hooks = (block._forward_hooks, block._forward_pre_hooks, block._backward_hooks, block._backward_pre_hooks)
    what = "hooks" if any(hooks) else "a forward of its own" if "forward" in block.__dict__ else None
    if what:
        raise ValueError(
            f"make_reversible: {path} has {what}, which a chain would not call. Remove them before, or leave the block "
            "out by chains."
        )

"""A block as Dr²Net runs it: G(x) = F(x) + alpha * x, of a module that is written with alpha = 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

G = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""G of a module, of x, and of alpha, a tensor of one number."""


@dataclass
class Unit:
    """One F of a chain.

    Attributes:
        path: of the module, for messages.
        module: what has the parameters.
        g: what is computed.
        slot: the name of the module's submodule for its shortcut, if `g` puts alpha there.
        rectified: the block ends in an activation with a kink.
        compiled: G as torch.compile made it, if it was called; a copy, or what is unpickled, is not compiled.
        is_known_to_be_closed: all that it trains are its parameters.
    """

    path: str
    module: nn.Module
    g: G
    slot: str | None = None
    rectified: bool = False
    compiled: G | None = None
    is_known_to_be_closed: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "compiled": None}

    def __call__(self, x: Tensor, alpha: Tensor) -> Tensor:
        """G(x)."""
        return (self.compiled or self.g)(self.module, x, alpha)

    def checked(self, x: Tensor, alpha: Tensor) -> Tensor:
        """G(x), if it can be computed again and added to the second stream.

        Raises:
            ValueError: it is no tensor of the shape of x, or the block writes to its input.
        """
        version = None if x.is_inference() else x._version
        found = self(x, alpha)
        if not isinstance(found, Tensor) or found.shape != x.shape:
            made = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"make_reversible: {self.path} makes {made} of {tuple(x.shape)}, but a block of a chain keeps the "
                "shape. Leave it out of the chain: it stays an ordinary block."
            )
        if version is not None and x._version != version:
            raise ValueError(
                f"make_reversible: {self.path} modifies its input in place, which backward could not rebuild. Set "
                "inplace=False on its first activation, or leave it out of the chain."
            )
        return found


def own_forward(module: nn.Module, x: Tensor) -> Any:
    """What the module's class computes: its forward itself is the chain's."""
    return type(module).forward(module, x)


def whole(module: nn.Module, x: Tensor, alpha: Tensor) -> Tensor:
    """Of any residual block: what it makes of x, with x taken off (1 - alpha) times."""
    found: Tensor = own_forward(module, x)
    fits = isinstance(found, Tensor) and found.shape == x.shape
    return found + (alpha - 1) * x if fits else found


class Shortcut(nn.Module):
    """alpha * x, in the place of a block's projection, which a block of equal shapes has none of."""

    alpha: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """x, if nobody has set alpha."""
        return x if self.alpha is None else self.alpha * x


@dataclass(frozen=True)
class WithShortcut:
    """Of a block that adds what its submodule `slot` makes of x: relu(f(x) + alpha * x), or without the relu."""

    slot: str

    def __call__(self, module: nn.Module, x: Tensor, alpha: Tensor) -> Tensor:
        """G(x); alpha stays where it is, as threads that run one model at a time have one alpha."""
        shortcut = getattr(module, self.slot)
        if not isinstance(shortcut, Shortcut):
            raise RuntimeError("restore() was called between forward and backward of a reversible network.")
        shortcut.alpha = alpha
        return own_forward(module, x)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Branch:
    """Of a block that has its F as a function of its own."""

    f: Callable[[Any, Tensor], Tensor]

    def __call__(self, module: nn.Module, x: Tensor, alpha: Tensor) -> Tensor:
        """G(x)."""
        return self.f(module, x) + alpha * x

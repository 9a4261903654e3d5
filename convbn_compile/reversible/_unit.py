"""A block as Dr²Net runs it: G(x) = F(x) + alpha * x, of a module that is written with alpha = 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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
        rectified: the block ends in an activation.
        compiled: G as torch.compile made it, if it was called.
        looked_at: True once a forward was seen to change nothing that a second one would change again.
    """

    path: str
    module: nn.Module
    g: G
    slot: str | None = None
    rectified: bool = False
    compiled: G | None = None
    looked_at: bool = field(default=False, repr=False)

    def __call__(self, x: Tensor, alpha: Tensor) -> Tensor:
        """G(x)."""
        return (self.compiled or self.g)(self.module, x, alpha)

    def checked(self, x: Tensor, alpha: Tensor) -> Tensor:
        """G(x), if it can be computed again and added to the second stream.

        Raises:
            ValueError: it has another shape than x, or the block writes to its input or to a buffer that is no running
                statistic.
        """
        version, buffers = x._version, {} if self.looked_at else self._versions()
        found = self(x, alpha)
        if found.shape != x.shape:
            raise ValueError(
                f"make_reversible: {self.path} makes {tuple(found.shape)} of {tuple(x.shape)}, but a block of a chain "
                "keeps the shape. Leave it out of the chain: it stays an ordinary block."
            )
        if x._version != version:
            raise ValueError(
                f"make_reversible: {self.path} modifies its input in place, which backward could not rebuild. Set "
                "inplace=False on its first activation, or leave it out of the chain."
            )
        written = [name for name, before in buffers.items() if self._versions()[name] != before]
        if written:
            raise ValueError(
                f"make_reversible: {self.path} writes to its buffer {written[0]} in forward, which backward would do "
                "a second time. Leave it out of the chain."
            )
        self.looked_at = True
        return found

    def trained(self) -> list[nn.Parameter]:
        """The parameters that want a gradient."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def _versions(self) -> dict[str, int]:
        return {
            f"{path}.{name}".lstrip("."): buffer._version
            for path, module in self.module.named_modules()
            if not hasattr(module, "track_running_stats")
            for name, buffer in module.named_buffers(recurse=False)
        }


def own_forward(module: nn.Module, x: Tensor) -> Tensor:
    """What the module's class computes: its forward itself is the chain's."""
    found: Tensor = type(module).forward(module, x)
    return found


def whole(module: nn.Module, x: Tensor, alpha: Tensor) -> Tensor:
    """Of any residual block: what it makes of x, with x taken off (1 - alpha) times."""
    found = own_forward(module, x)
    return found + (alpha - 1) * x if found.shape == x.shape else found


class Shortcut(nn.Module):
    """alpha * x, in the place of a block's projection, which a block of equal shapes has none of."""

    alpha: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """x, if nobody has set alpha."""
        return x if self.alpha is None else self.alpha * x


def with_shortcut(slot: str) -> G:
    """Of a block that adds what its submodule `slot` makes of x: relu(f(x) + alpha * x), or without the relu."""

    def g(module: nn.Module, x: Tensor, alpha: Tensor) -> Tensor:
        shortcut = getattr(module, slot)
        shortcut.alpha = alpha
        try:
            return own_forward(module, x)
        finally:
            shortcut.alpha = None

    return g

"""Whether blocks that are adapted run with a graph where the model does: in a reentrant checkpoint they do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Watch:
    """Hooks of a model, which raise where its side network would get no gradient.

    Compiled code has neither: Dynamo makes one graph of a checkpoint and what is around it.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.without_graph: str | None = None
        self.hooks = [model.register_forward_pre_hook(self._before), model.register_forward_hook(self._after)]

    def adapts(self, path: str) -> None:
        """A block of this path does, now."""
        if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            self.without_graph = path

    def remove(self) -> None:
        """The hooks."""
        for hook in self.hooks:
            hook.remove()

    def _before(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.without_graph = None

    def _after(self, model: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
            return
        if self.without_graph is not None:
            raise RuntimeError(
                f"{self.without_graph} is side-tuned and ran without a graph, as in a reentrant checkpoint, so that "
                "the side network would get no gradient. Use use_reentrant=False."
            )

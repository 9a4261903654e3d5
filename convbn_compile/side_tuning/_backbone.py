"""How the backbone of a model is frozen, and let go of."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from convbn_compile import _torch
from convbn_compile.modes import hold_batch_norms, let_go_of_batch_norms

SIDE = "side_network"
"""The name of the side network among the children of a model."""


class Frozen:
    """A model of which only some modules are trained, and whose other batch norms stay in eval mode through train().

    Args:
        model: the model.
        trained: the paths of the modules.
    """

    def __init__(self, model: nn.Module, trained: Sequence[str]) -> None:
        inside = {module for path in trained for module in model.get_submodule(path).modules()}
        kept = {id(parameter) for module in inside for parameter in module.parameters()}
        norms = (module for module in model.modules() if isinstance(module, _torch.BatchNormModule))
        self.model = model
        self.norms = [norm for norm in norms if norm.running_mean is not None and norm not in inside]
        self.before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.requires_grad = id(parameter) in kept
        hold_batch_norms(self.norms)

    def release(self) -> None:
        """All is as it was, of parameters that took the place of others, too."""
        for name, parameter in self.model.named_parameters():
            if name in self.before:
                parameter.requires_grad = self.before[name]
        let_go_of_batch_norms(self.norms)

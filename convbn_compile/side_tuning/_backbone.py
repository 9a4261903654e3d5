"""How the backbone of a model is frozen, and let go of."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from convbn_compile import _torch
from convbn_compile.modes import hold_batch_norms, let_go_of_batch_norms

SIDE = "side_network"
"""The name of the side network among the children of a model."""

TRACKING = (_torch.BatchNormModule, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
"""Norms that may have running statistics."""


class Frozen:
    """A model of which only some modules are trained, and whose norms keep what they have counted through train().

    Args:
        model: the model.
        trained: the paths of the modules.
    """

    def __init__(self, model: nn.Module, trained: Sequence[str]) -> None:
        inside = {module for path in trained for module in model.get_submodule(path).modules()}
        kept = {id(parameter) for module in inside for parameter in module.parameters()}
        self.model = model
        self.norms = [module for module in model.modules() if _counts(module)]
        self.before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.requires_grad = id(parameter) in kept
        hold_batch_norms(self.norms)
        self.versions = Versions(model, tuple(f"{path}." for path in (SIDE, *trained)))

    def release(self) -> None:
        """All is as it was, of parameters that took the place of others, too."""
        for name, parameter in self.model.named_parameters():
            if name in self.before:
                parameter.requires_grad = self.before[name]
        let_go_of_batch_norms(self.norms)

    def check(self) -> None:
        """See to it that running the model changed nothing of the backbone.

        Raises:
            ValueError: it changed buffers.
        """
        changed = self.versions.changed(self.model)
        if changed:
            raise ValueError(
                f"The backbone is not what it was at attach: {', '.join(changed)} changed, as in train mode. Keep what "
                "has them in eval mode, and load the weights of the backbone again."
            )


class Versions:
    """Of what is in the buffers of a backbone: cheaper to compare than values, and of this model only, not of a copy.

    Args:
        model: the model, None of a copy.
        without: prefixes of names that do not count.
    """

    def __init__(self, model: nn.Module | None = None, without: tuple[str, ...] = ()) -> None:
        self.without, self.parameters = without, 0
        self.buffers: dict[str, tuple[weakref.ref[Tensor], int]] = {}
        if model is not None:
            self._note(model)

    def __reduce__(self) -> tuple[Any, ...]:
        return Versions, ()

    def changed(self, model: nn.Module) -> list[str]:
        """Names of the buffers that did while the parameters did not; with both somebody loaded weights."""
        if self.buffers and self._sum(model) != self.parameters:
            self._note(model)
        there = dict(model.named_buffers())
        same = {name: version for name, (ref, version) in self.buffers.items() if ref() is there.get(name, self)}
        return [name for name, version in same.items() if _version(there[name]) != version]

    def _note(self, model: nn.Module) -> None:
        kept, self.parameters = model.state_dict().keys(), self._sum(model)
        floating = {name: each for name, each in self._counted(model.named_buffers()) if each.is_floating_point()}
        self.buffers = {name: (weakref.ref(each), _version(each)) for name, each in floating.items() if name in kept}

    def _sum(self, model: nn.Module) -> int:
        return sum(_version(each) for _, each in self._counted(model.named_parameters()))

    def _counted(self, named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        return [(name, each) for name, each in named if not name.startswith(self.without)]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _counts(module: nn.Module) -> bool:
    """Whether it changes in train mode, as norms with running statistics and spectral norms."""
    if isinstance(module, TRACKING):
        return module.running_mean is not None
    hooks = module._forward_pre_hooks.values()
    return any(isinstance(each, _torch.SpectralNorms) for each in (module, *hooks))

"""What a block's second run needs to be like its first: weights, modes, buffers, random numbers, autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convbn_compile import _torch

STATISTICS = (_torch.BatchNormModule, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
"""Norms, which in training read nothing of the statistics that they write to."""


@dataclass(frozen=True)
class RandomState:
    """The generators before a block ran: the CPU's, and that of the device which it runs on."""

    cpu: Tensor
    device: torch.device | None
    state: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """As they are."""
        if device.type in ("cpu", "meta"):
            return cls(torch.get_rng_state(), None, None)
        return cls(torch.get_rng_state(), device, torch.get_device_module(device).get_rng_state(device))

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside, random numbers are those that were drawn then; outside they go on as if nothing was."""
        devices = [] if self.device is None else [self.device]
        with torch.random.fork_rng(devices, device_type="cuda" if self.device is None else self.device.type):
            torch.set_rng_state(self.cpu)
            if self.device is not None:
                torch.get_device_module(self.device).set_rng_state(self.state, self.device)
            yield


@dataclass(frozen=True)
class Autocast:
    """The caller's autocast, which autograd's backward is not in."""

    device_type: str
    dtype: torch.dtype | None

    @classmethod
    def now(cls, device_type: str) -> Autocast:
        """As it is; the dtype is None where there is none."""
        enabled = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if enabled else None
        return cls(device_type, dtype)

    def again(self) -> contextlib.AbstractContextManager[Any]:
        """The same, without its cache, which would keep what is cast of the copies of weights."""
        if not torch.amp.is_autocast_available(self.device_type):
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None, cache_enabled=False)


@dataclass(frozen=True)
class State:
    """What a module has at a time: parameters, and the tensor of each; modes; versions of buffers."""

    module: nn.Module
    parameters: Mapping[tuple[nn.Module, str], Tensor]
    modes: Mapping[nn.Module, bool]
    buffers: Mapping[tuple[nn.Module, str], tuple[int, int]]

    @classmethod
    def now(cls, module: nn.Module) -> State:
        """As it is."""
        modules = list(module.modules())
        parameters = {
            (each, name): tensor for each in modules for name, tensor in each._parameters.items() if tensor is not None
        }
        modes = {each: each.training for each in modules}
        return cls(module, parameters, modes, _versions(modes))

    def written(self) -> str | None:
        """The path of a buffer that is another now, or was written to; statistics of norms in training left out."""
        now = _versions(self.modes)
        written = next((key for key, version in self.buffers.items() if now.get(key) != version), None)
        if written is None:
            return None
        module, name = written
        path = next(path for path, each in self.module.named_modules() if each is module)
        return f"{path}.{name}".lstrip(".")

    @contextlib.contextmanager
    def again(self, tensors: Mapping[Tensor, Tensor]) -> Iterator[None]:
        """Inside, modes are those, parameters are what `tensors` has for them, and statistics in training copies."""
        with contextlib.ExitStack() as stack:
            for (module, name), tensor in self.parameters.items():
                stack.callback(module._parameters.__setitem__, name, module._parameters[name])
                module._parameters[name] = tensors[tensor]  # type: ignore[assignment]
            for module, training in self.modes.items():
                if training and isinstance(module, STATISTICS):
                    for name, buffer in module._buffers.items():
                        stack.callback(module._buffers.__setitem__, name, buffer)
                        module._buffers[name] = None if buffer is None else buffer.clone()
                if module.training != training:
                    stack.callback(setattr, module, "training", module.training)
                    module.training = training
            yield


def _versions(modes: Mapping[nn.Module, bool]) -> dict[tuple[nn.Module, str], tuple[int, int]]:
    return {
        (module, name): (id(buffer), 0 if buffer.is_inference() else buffer._version)
        for module, training in modes.items()
        if not (training and isinstance(module, STATISTICS))
        for name, buffer in module._buffers.items()
        if buffer is not None
    }

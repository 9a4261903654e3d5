"""What a block's second run needs to be like its first: random numbers, autocast, and statistics that stay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RandomState:
    """The generators before a block ran: the CPU's, and that of the GPU which it runs on."""

    cpu: Tensor
    device: torch.device | None
    gpu: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """As they are."""
        if device.type != "cuda":
            return cls(torch.get_rng_state(), None, None)
        return cls(torch.get_rng_state(), device, torch.cuda.get_rng_state(device))

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside, random numbers are those that were drawn then; outside they go on as if nothing was."""
        with torch.random.fork_rng([] if self.device is None else [self.device]):
            torch.set_rng_state(self.cpu)
            if self.gpu is not None and self.device is not None:
                torch.cuda.set_rng_state(self.gpu, self.device)
            yield


@dataclass(frozen=True)
class Autocast:
    """The caller's autocast, which autograd's backward is not in."""

    device_type: str
    enabled: bool
    dtype: torch.dtype
    cache: bool

    @classmethod
    def now(cls, device_type: str) -> Autocast:
        """As it is."""
        enabled = torch.is_autocast_enabled(device_type)
        return cls(device_type, enabled, torch.get_autocast_dtype(device_type), torch.is_autocast_cache_enabled())

    def again(self) -> torch.autocast:
        """The same."""
        return torch.autocast(self.device_type, self.dtype, enabled=self.enabled, cache_enabled=self.cache)


@contextlib.contextmanager
def statistics_stay(module: nn.Module) -> Iterator[None]:
    """Norms in training mode normalise by the batch inside, as ever, and count it in no running statistics."""
    tracking = [each for each in module.modules() if each.training and getattr(each, "track_running_stats", False)]
    _track(tracking, track=False)
    try:
        yield
    finally:
        _track(tracking, track=True)


def _track(norms: Iterable[Any], *, track: bool) -> None:
    for norm in norms:
        norm.track_running_stats = track

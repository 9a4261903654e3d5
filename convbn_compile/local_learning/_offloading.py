"""What of a network is in memory: what is not in use is in the storage, and takes none (offloading).

Only the block in training is in memory, and what its input is computed by (NeuroFlux, arXiv 2402.14139).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product

import torch
from torch import Tensor, nn

from convbn_compile.local_learning._local import LocalUnit

Values = Mapping[str, Tensor]
"""Of one LocalUnit, by name."""

Part = tuple[int, str]
"""The number of a LocalUnit, and "unit" or "head"."""


class Offloading:
    """Of the units of a run, none of which has the run's values at first.

    Args:
        units: of the network.
        device: where they are used.
        values: returns the last values of all of them, as the storage has them.
    """

    def __init__(
        self, units: Sequence[LocalUnit], device: torch.device, values: Callable[[], Sequence[Values]]
    ) -> None:
        self._units, self._device, self._values = units, device, values
        self._strides = {tensor: tensor.stride() for unit in units for tensor in _stored(unit)}
        self._all = set(product(range(len(units)), ("unit", "head")))
        self._there: set[Part] = set()

    def use(self, block: range, before: range = range(0)) -> None:
        """Have in memory a block and, without their heads, the units before it that compute its input; nothing else."""
        self._use({*product((*before, *block), ("unit",)), *product(block, ("head",))}, self._device)

    @contextmanager
    def using(self, before: range) -> Iterator[None]:
        """Have units in memory without their heads, and afterwards what was there."""
        parts = set(self._there)
        self.use(range(0), before)
        yield
        self._use(parts, self._device)

    def bring(self, home: torch.device) -> None:
        """Have everything in memory, on a device."""
        self._use(self._all, home)
        for unit in self._units:
            unit.to(home)

    def _use(self, parts: set[Part], device: torch.device) -> None:
        """What is freed must be in the storage: blocks that are trained to their end, or not at all."""
        self._there &= parts
        for part in self._all - parts:
            _free(self._module(part))
        missing = sorted(parts - self._there)
        values = self._values() if missing else []
        for number, name in missing:
            own = {key: value for key, value in values[number].items() if key.startswith(f"{name}.")}
            self._fill(self._module((number, name)), {key.partition(".")[2]: own[key] for key in own}, device)
            self._there.add((number, name))

    def _module(self, part: Part) -> nn.Module:
        number, name = part
        return self._units[number].get_submodule(name)

    def _fill(self, module: nn.Module, values: Values, device: torch.device) -> None:
        for tensor in _stored(module):
            tensor.data = torch.empty_strided(tensor.shape, self._strides[tensor], dtype=tensor.dtype, device=device)
        module.to(device).load_state_dict(values)


def _stored(module: nn.Module) -> Iterator[Tensor]:
    """What a module has in a storage, but for counters."""
    tensors = (value for value in module.state_dict(keep_vars=True).values() if isinstance(value, Tensor))
    return (tensor for tensor in tensors if tensor.is_floating_point())


def _free(module: nn.Module) -> None:
    """Keep shapes, with a single element of memory, so that what uses a value by mistake comes to nan."""
    for tensor in _stored(module):
        tensor.data = tensor.new_full((1,) * tensor.dim(), math.nan).expand(tensor.shape)

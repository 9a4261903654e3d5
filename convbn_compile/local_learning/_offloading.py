"""What of a network is in memory: what is not in use is in the storage (offloading).

Only the block in training is in memory, and what its input is computed by (NeuroFlux, arXiv 2402.14139). Parameters
are the same objects meanwhile and afterwards; the memory behind them is new. What is left in memory are integers, what
is in no state dict, and what shares its memory with other tensors.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from convbn_compile.local_learning._local import LocalUnit

Values = Mapping[str, Any]
"""A state dict of a LocalUnit."""

Part = tuple[int, str]
"""The number of a LocalUnit, and "unit" or "head"."""


class Offloading:
    """Of the units of a run, whose values are at first those of the model, not of the run.

    Args:
        units: of the network.
        device: where they are used.
        values: returns the last values of the unit with a number, as the storage has them.
    """

    def __init__(self, units: Sequence[LocalUnit], device: torch.device, values: Callable[[int], Values]) -> None:
        self._units, self._device, self._values = units, device, values
        self._all = set(product(range(len(units)), ("unit", "head")))
        self._there: set[Part] = set()
        self._freed: set[Part] = set()
        alone = _alone(units)
        self._layouts = {
            part: {name: (one.shape, one.stride()) for name, one in _stored(self._module(part)) if one in alone}
            for part in self._all
        }

    def use(self, block: range, before: range = range(0)) -> None:
        """Have in memory a block and, without their heads, the units before it that compute its input; nothing else.

        What is not there afterwards must be in the storage: a block is trained to its end, or not at all.
        """
        self._use({*product((*before, *block), ("unit",)), *product(block, ("head",))})

    @contextmanager
    def using(self, before: range) -> Iterator[None]:
        """Have units in memory without their heads, and afterwards what was there."""
        parts = set(self._there)
        self.use(range(0), before)
        yield
        self._use(parts)

    def bring(self, home: torch.device) -> None:
        """Have everything in memory, on a device.

        Raises:
            Exception: values cannot be read, and are nan where they were freed; all others are there.
        """
        cpu, errors = torch.device("cpu"), []
        for part in sorted(self._all - self._there):
            try:
                self._fill(part, self._values(part[0]), cpu)
            except Exception as error:  # noqa: BLE001  the rest is brought first
                errors.append(error)
        for part in self._freed:
            self._make_room(part, cpu)
        for unit in self._units:
            unit.to(home)
        if errors:
            raise errors[0]

    def _use(self, parts: set[Part]) -> None:
        missing = sorted(parts - self._there)
        values = {number: self._values(number) for number in {number for number, _ in missing}}
        self._there &= parts  # what can be read is freed now, not before
        for part in self._all - parts - self._freed:
            self._free(part)
        for part in missing:
            self._fill(part, values[part[0]], self._device)

    def _module(self, part: Part) -> nn.Module:
        number, name = part
        return self._units[number].get_submodule(name)

    def _offloaded(self, part: Part) -> Iterator[tuple[str, Tensor]]:
        return ((name, one) for name, one in _stored(self._module(part)) if name in self._layouts[part])

    def _free(self, part: Part) -> None:
        """Keep shapes, with a single element of memory, so that what uses a value by mistake comes to nan."""
        for _, tensor in self._offloaded(part):
            tensor.data = torch.full((1,) * tensor.dim(), math.nan, dtype=tensor.dtype).expand(tensor.shape)
            tensor.grad = None
        self._module(part).to("cpu")
        self._freed.add(part)

    def _make_room(self, part: Part, device: torch.device) -> None:
        for name, tensor in self._offloaded(part):
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            shape, stride = self._layouts[part][name]
            if tensor.shape == shape:  # else the model has replaced it
                new = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=device)
            tensor.data = new.fill_(math.nan)
        self._module(part).to(device)

    def _fill(self, part: Part, values: Values, device: torch.device) -> None:
        self._make_room(part, device)
        self._module(part).load_state_dict(_of_part(values, part[1]))
        self._freed.discard(part)
        self._there.add(part)


def _of_part(values: Values, name: str) -> Values:
    """What a state dict of a LocalUnit has for its unit or its head, with the versions of modules."""
    cut = len(f"{name}.")
    own = OrderedDict((key[cut:], value) for key, value in values.items() if key.startswith(f"{name}."))
    versions = getattr(values, "_metadata", {}).items()
    vars(own)["_metadata"] = {key[cut:]: each for key, each in versions if f"{key}.".startswith(f"{name}.")}
    return own


def _stored(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a state dict has of a module that takes memory worth mentioning: no integers."""
    names = set(module.state_dict())
    for given in (module.named_parameters, module.named_buffers):
        for name, tensor in given(remove_duplicate=False):
            if name in names and (tensor.is_floating_point() or tensor.is_complex()):
                yield name, tensor


def _alone(units: Sequence[LocalUnit]) -> set[Tensor]:
    """The tensors whose memory nothing else has a part of, as far as units know."""
    tensors = {tensor for unit in units for tensor in (*unit.parameters(), *unit.buffers())}
    times = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors)
    return {
        tensor
        for tensor in tensors
        if times[tensor.untyped_storage().data_ptr()] == 1 and tensor.untyped_storage().nbytes() == tensor.nbytes
    }

"""A unit with its head: one local loss, one optimizer, and a graph that ends with the step.

    a_l = f_l(a_{l-1}),   loss_l = cross_entropy(head_l(a_l), y),   a_l is handed on detached

The unit learns from its own loss alone, so that what backward needs is that of one unit at a time (local learning;
NeuroFlux, arXiv 2402.14139). The last unit's head is the network's own classifier.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from convbn_compile import _torch
from convbn_compile._arguments import shown
from convbn_compile.local_learning._units import Unit

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
"""From parameters to what trains them."""


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The default: SGD with momentum; the paper's optimizer is not public."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)


class LocalUnit(nn.Module):
    """A unit and its head.

    Args:
        unit: the unit.
        head: from its output to logits.
        options: of torch.compile(backend="convbn_tune"), the mode left out.
    """

    def __init__(self, unit: Unit, head: nn.Module, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.unit, self.head = unit.module, head
        self.name = unit.name
        self._options = {**options, "mode": "train"}
        self._step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The output, detached, and the local loss."""
        output = self.unit(x)
        return output.detach(), F.cross_entropy(self.head(output), target)

    def step(self, x: Tensor, target: Tensor, optimizer: torch.optim.Optimizer) -> tuple[Tensor, Tensor]:
        """Train it on a batch; no gradient is left.

        Args:
            x: what the unit before hands on, [N, ...].
            target: classes, int64 [N].
            optimizer: of its parameters.

        Returns:
            What it hands on, and its loss before the step.
        """
        if self._step is None:
            self._step = _torch.compile_for_any_batch(self.forward, backend="convbn_tune", options=self._options)
        _torch.mark_batch(x, target)
        output, loss = self._step(x, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return output, loss.detach()

    def check(self) -> None:
        """See to it that there is something to train.

        Raises:
            ValueError: there is not.
        """
        if not self.trained():
            raise ValueError(f"unit {self.name}: it and its head have no parameter that requires a gradient.")

    def trained(self) -> list[nn.Parameter]:
        """What its optimizer gets."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def optimizer_of(unit: LocalUnit, optimizer: Optimizer) -> torch.optim.Optimizer:
    """What trains a unit.

    Raises:
        TypeError: the function returns no optimizer.
        ValueError: its optimizer needs a closure.
    """
    made = optimizer(unit.trained())
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"optimizer: the function has to return an optimizer of torch.optim, got {shown(made)}.")
    if isinstance(made, torch.optim.LBFGS):
        raise ValueError("optimizer: LBFGS needs a closure that computes the loss again; use another one.")
    return made


def resident_bytes(module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of parameters, buffers and the optimizer's state."""
    state = optimizer.state.values() if optimizer else ()
    tensors = [*module.parameters(), *module.buffers(), *_torch.tensors_in([dict(each) for each in state])]
    memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(memory.values())


@contextmanager
def seeded(device: torch.device, *numbers: int) -> Iterator[None]:
    """Random numbers of torch that depend on some numbers alone; those of everybody else go on as if nothing was.

    Args:
        device: whose random numbers are meant, beside the CPU's.
        numbers: any.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed_of(*numbers))
        yield


def seed_of(*numbers: int) -> int:
    """Another one for any other numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")


@contextmanager
def keeping_modes(module: nn.Module) -> Iterator[None]:
    """Whatever train() and eval() do inside, every module is afterwards in the mode that it was in."""
    modes = {each: each.training for each in module.modules()}
    try:
        yield
    finally:
        for each, mode in modes.items():
            each.training = mode

"""What a step of a model takes: its time, the bytes it saves for backward, its peak of memory, its convolutions."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convbn_compile import _torch
from convbn_compile._extras import require


def saved_for_backward(function: Callable[..., Any], model: nn.Module, *inputs: Any, **kwargs: Any) -> int:
    """Bytes that one call of `function` keeps for backward, parameters, buffers and inputs of `model` not counted."""
    given = _storages([*model.parameters(), *model.buffers(), *_torch.tensors_in((inputs, kwargs))])
    saved: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = 0 if storage.data_ptr() in given else storage.nbytes()
        kept.append(tensor)  # so that no storage is reused while we look
        return tensor

    hooks = [torch.compiler.disable(hook) for hook in (pack, lambda tensor: tensor)]  # type: ignore[no-untyped-call]
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        output = function(*inputs, **kwargs)
    del output
    return sum(saved.values())


def _storages(tensors: Sequence[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@dataclass(frozen=True)
class Step:
    """One step of training without the optimizer's part: forward, and backward from the sum of all outputs.

    Attributes:
        function: the model, or what torch.compile made of it.
        model: whose gradients are discarded before the step.
        args: what the function is called with.
        kwargs: likewise.
        autocast: the dtype to cast to in forward.
        backward: without it the step is a call for inference.
    """

    function: Callable[..., Any]
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    autocast: torch.dtype | None = None
    backward: bool = True

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return next(iter(_torch.tensors_in((self.args, self.kwargs)))).device

    def forward(self, function: Callable[..., Any] | None = None) -> Any:
        """What the function, or another one in its place, makes of the inputs."""
        enabled = self.autocast is not None
        with torch.autocast(self.device.type, self.autocast, enabled=enabled), torch.set_grad_enabled(self.backward):
            return (function or self.function)(*self.args, **self.kwargs)

    def __call__(self) -> None:
        """Run it.

        Raises:
            ValueError: no output requires a gradient.
        """
        output = self.forward()
        if not self.backward:
            return
        outputs = [tensor for tensor in _torch.tensors_in(output) if tensor.requires_grad]
        if not outputs:
            raise ValueError("no output requires a gradient, so there is no backward: is everything frozen?")
        torch.autograd.backward([tensor.sum() for tensor in outputs])

    def discard_gradients(self) -> None:
        """Of the parameters and the inputs."""
        for tensor in (*self.model.parameters(), *_torch.tensors_in((self.args, self.kwargs))):
            tensor.grad = None

    def seconds(self) -> float:
        """How long it takes; gradients are new each time."""
        self.discard_gradients()
        _wait_for(self.device)
        start = time.perf_counter()
        self()
        _wait_for(self.device)
        took = time.perf_counter() - start
        self.discard_gradients()
        return took

    def saved_bytes(self) -> int | None:
        """What is kept between forward and backward; None without backward."""
        if not self.backward:
            return None

        def counted(*args: Any, **kwargs: Any) -> int:
            return saved_for_backward(self.function, self.model, *args, **kwargs)

        return int(self.forward(counted))

    def peak(self, before: Peak) -> Peak:
        """The most memory it takes; on CUDA less what was held before."""
        self.discard_gradients()
        peak = _peak_of_device(self, before) if self.device.type == "cuda" else Peak(_rise_of_process(self))
        self.discard_gradients()
        return peak

    def convolutions(self) -> tuple[int, int]:
        """How many calls of convolutions run, forward (those that a checkpoint repeats included) and backward."""
        ran = _torch.operators_run(self)
        self.discard_gradients()
        return sum(ran[name] for name in FORWARD), ran[BACKWARD]


FORWARD = ("aten::convolution", "mkldnn::_convolution_pointwise", "mkldnn::_convolution_pointwise_")
BACKWARD = "aten::convolution_backward"


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- peak memory -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peak:
    """Memory in bytes, at most.

    Attributes:
        bytes: on CUDA of tensors, weights and inputs included (max_memory_allocated); on a CPU of the process, above
            what it held before the step.
        reserved: CUDA's max_memory_reserved.
    """

    bytes: int
    reserved: int | None = None


def held(device: torch.device) -> Peak:
    """What is held now, on CUDA."""
    if device.type != "cuda":
        return Peak(0)
    gc.collect()
    torch.cuda.empty_cache()
    return Peak(torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device))


def allocated_peak(function: Callable[[], Any], device: torch.device) -> int:
    """By how many bytes a call raises what is allocated on a device, at most, what operators need inside included."""
    if device.type != "cuda":
        return _torch.allocation_peak(function)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_of_device(step: Step, before: Peak) -> Peak:
    held(step.device)
    torch.cuda.reset_peak_memory_stats(step.device)
    step()
    torch.cuda.synchronize(step.device)
    most = torch.cuda.max_memory_allocated(step.device), torch.cuda.max_memory_reserved(step.device)
    return Peak(most[0] - before.bytes, most[1] - (before.reserved or 0))


CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
"""Where Linux resets and tells the most memory that the process held."""


def _rise_of_process(step: Callable[[], None]) -> int:
    """By how much a step raises the process's resident memory, at most: exact on Linux, elsewhere from samples.

    Memory that malloc holds for later is given back first, so that the step has to ask for its own again.
    """
    process = require("psutil", extra="bench").Process()
    gc.collect()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)
    before = int(process.memory_info().rss)
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return max(_sampled(step, lambda: int(process.memory_info().rss))) - before
    step()
    return max(0, _high_water_mark() - before)


def _high_water_mark() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def _sampled(step: Callable[[], None], look: Callable[[], int]) -> list[int]:
    """What `look` saw before, every millisecond during, and after a step."""
    seen, done = [look()], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(look())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        step()
    finally:
        done.set()
        watcher.join()
    return [*seen, look()]

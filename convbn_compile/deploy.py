"""mode="deploy": what a graph makes of weights alone is kept, and made again when one of them changes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import lru_cache
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from convbn_compile import _torch
from convbn_compile._constants import Split, split

_DEPLOYED: weakref.WeakSet[Deployed] = weakref.WeakSet()
"""Every graph that keeps something."""


def refresh(model: nn.Module) -> int:
    """Have every deployed graph that reads a tensor of the model fold it again at its next call.

    For what no version counts: writes through `.data`, NumPy or other libraries that share the memory. Optimizer
    steps, load_state_dict, writes under torch.no_grad(), `.data = ` and `.to()` are seen without it.

    Args:
        model: a module, compiled or not, or a part of one.

    Returns:
        How many graphs will be folded again; 0 before the first call of a deployed model.

    Raises:
        TypeError: `model` is not a module.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval().requires_grad_(False)
        >>> deployed = torch.compile(net, backend="convbn_tune", options={"mode": "deploy", "lowering": "aot_eager"})
        >>> before = deployed(torch.ones(1, 3, 8, 8))
        >>> _ = net[0].weight.data.mul_(2)
        >>> refresh(net)
        1
        >>> torch.equal(before, deployed(torch.ones(1, 3, 8, 8)))
        False
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"refresh needs a torch.nn.Module, got {model!r} ({type(model).__name__}).")
    tensors = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    readers = [deployed for deployed in _DEPLOYED if not tensors.isdisjoint(map(id, deployed.sources))]
    for deployed in readers:
        deployed.forget()
    return len(readers)


def keep_constants(
    module: GraphModule,
    inputs: Sequence[Any],
    static: Sequence[int],
    compile_graph: _torch.CompileGraph,
    statistics: Sequence[Mapping[str, Any]],
) -> _torch.CompiledFunction:
    """Compile an inference graph so that what is made of static inputs alone is computed once.

    Args:
        module: the graph, in functional form.
        inputs: what it was traced with.
        static: which inputs are the same tensors in every call.
        compile_graph: compiles a graph, with its inputs and the static ones among them.
        statistics: the buffers of every batch norm of the graph.
    """
    parts = split(module, static)
    if parts is None:
        return compile_graph(module, inputs, static)
    kept = [node.meta["val"] for node in parts.kept]
    fixed = [*range(len(kept)), *(len(kept) + at for at, index in enumerate(parts.others) if index in static)]
    compiled = compile_graph(parts.rest, [*kept, *(inputs[index] for index in parts.others)], fixed)
    return Deployed(parts, compiled, statistics)


class Deployed:
    """What AOTAutograd calls in place of an inference graph: keeps its constants, and looks whether they still hold.

    Before each call every source is compared with what was folded: the same tensor, version and memory.

    Attributes:
        sources: the tensors that were folded.
    """

    def __init__(
        self, parts: Split, compiled: _torch.CompiledFunction, statistics: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self._parts = parts
        self._compiled = compiled
        self._statistics = tuple(statistics)
        self._fused_steps = _fused_steps()
        self._kept: list[Tensor] = []
        self._lock = threading.Lock()
        self.sources: list[Tensor] = []
        self.forget()
        self._boxed_call = True  # AOTAutograd's word for one that takes a list, and empties it
        _DEPLOYED.add(self)

    def forget(self) -> None:
        """Fold again at the next call."""
        self._versions: list[int] | None = None

    def _count(self, sources: Sequence[Tensor]) -> list[int] | None:
        """The versions of the sources, and of what is written to with them where torch counts none for them.

        Eager batch norm in training mode counts one for num_batches_tracked alone (torch 2.13).
        """
        batches = [buffers["num_batches_tracked"] for buffers in self._statistics]
        return _torch.versions([*sources, *batches, self._fused_steps])

    def is_current(self, sources: Sequence[Tensor]) -> bool:
        """True if what is kept was made of these tensors, and none was written to since."""
        return (
            self._versions is not None
            and all(map(is_, sources, self.sources))
            and self._versions == self._count(sources)
            and self._addresses == list(map(Tensor.data_ptr, sources))
            and not _torch.writes_uncounted()
        )

    def __call__(self, inputs: list[Any]) -> Any:
        """Run the graph; `inputs` are all of its inputs, and are emptied."""
        sources = [inputs[index] for index in self._parts.sources]
        if not self.is_current(sources):
            self._fold(sources)
        rest = [*self._kept, *(inputs[index] for index in self._parts.others)]
        inputs.clear()
        return self._compiled(rest)

    def _fold(self, sources: list[Tensor]) -> None:
        """Make the constants: in the memory they have, so that CUDA graphs stay valid, once there is some."""
        with self._lock:
            versions = self._count(sources)
            with torch.inference_mode(mode=False), torch.no_grad(), _torch.no_autocast():
                made = self._parts.constants(*sources)
                if not self._kept:
                    self._kept = list(map(_torch.as_traced, made, self._parts.kept))
                else:
                    for old, new in zip(self._kept, made, strict=True):
                        old.copy_(new)
            self.sources, self._versions = sources, versions
            self._addresses = list(map(Tensor.data_ptr, sources))
            self._memory = [source.untyped_storage() for source in sources]  # so that no other tensor gets its address


@lru_cache(maxsize=1)
def _fused_steps() -> Tensor:
    """A tensor that has a new version after every step of a fused optimizer, which counts none itself (torch 2.13)."""
    steps = torch.zeros((), device="cpu")

    def count(optimizer: Optimizer, *_: Any) -> None:
        if not torch.compiler.is_compiling() and any(group.get("fused") for group in optimizer.param_groups):
            torch.autograd.graph.increment_version(steps)

    register_optimizer_step_post_hook(count)
    return steps

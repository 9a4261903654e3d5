"""mode="deploy": what a graph makes of weights alone is kept, and made again when one of them changes."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.fx import GraphModule
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from convbn_compile import _torch
from convbn_compile._constants import Split, keep_in_channels_last, split

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
    kept = kept_of(model)
    for graph, folded in kept:
        graph.forget(folded)
    return len(kept)


def kept_of(model: nn.Module) -> list[tuple[Deployed, Folded]]:
    """What is kept that was made of a parameter or buffer of the model, and by which graph."""
    tensors = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    return [
        (graph, folded)
        for graph in list(_DEPLOYED)
        for folded in graph.folded()
        if not tensors.isdisjoint(id(source()) for source in folded.sources)
    ]


def keep_constants(
    module: GraphModule,
    inputs: Sequence[Any],
    static: Sequence[int],
    compile_graph: _torch.CompileGraph,
    *,
    for_inductor: bool = False,
) -> _torch.CompiledFunction:
    """Compile an inference graph so that what is made of static inputs alone is computed once.

    Args:
        module: the graph, in functional form.
        inputs: what it was traced with.
        static: which inputs are the same tensors in every call.
        compile_graph: compiles a graph, with its inputs and the static ones among them.
        for_inductor: the memory layout of what is kept may be the one that suits Inductor.
    """
    try:
        parts = split(module, static)
        if parts is not None and for_inductor and _torch.prefers_channels_last(parts.rest):
            parts = keep_in_channels_last(parts)
    except Exception as error:  # noqa: BLE001  a user's program never dies of our optimisation
        warnings.warn(
            f"convbn_tune folds in every call of a deployed graph, because it could not be split: {error!r}. "
            "Please report this as an issue of convbn_compile, with the model that shows it.",
            stacklevel=2,
        )
        parts = None
    if parts is None:
        return compile_graph(module, inputs, static)
    count = len(parts.kept)
    fixed = [*range(count), *(count + at for at, index in enumerate(parts.others) if index in static)]
    compiled = compile_graph(parts.rest, [*parts.kept, *(inputs[index] for index in parts.others)], fixed)
    return Deployed(parts, compiled)


@dataclass(frozen=True)
class Folded:
    """What was made of some sources, and how they were then.

    Attributes:
        sources: the tensors; it is forgotten when one of them is no more.
        kept: the constants.
        memory: that of the sources, so that no other tensor gets its address.
        addresses: likewise.
        counters: num_batches_tracked of every batch norm whose running statistics are among the sources.
        versions: of sources and counters, and steps of fused optimizers; None if one has no version.
    """

    sources: tuple[weakref.ref[Tensor], ...]
    kept: list[Tensor]
    memory: list[UntypedStorage]
    addresses: list[int]
    counters: list[Tensor]
    versions: list[int] | None

    def is_of(self, sources: Sequence[Tensor]) -> bool:
        """True if none of the sources, the same as then, was written to since."""
        return (
            self.versions is not None
            and self.versions == _versions(sources, self.counters)
            and self.addresses == list(map(Tensor.data_ptr, sources))
            and not _torch.writes_uncounted()
        )


class Deployed:
    """What AOTAutograd calls in place of an inference graph: keeps its constants, and looks whether they still hold.

    Before each call every source is compared with what was folded: the same tensor, version and memory. Dynamo may use
    one graph for several models of one class, so that there may be several sets of sources.
    """

    def __init__(self, parts: Split, compiled: _torch.CompiledFunction) -> None:
        self._parts = parts
        self._compiled = compiled
        self._select = _selector(parts.sources)
        self._folded: dict[tuple[int, ...], Folded] = {}
        self._lock = threading.Lock()
        self._boxed_call = True  # AOTAutograd's word for one that takes a list, and empties it
        _DEPLOYED.add(self)

    def folded(self) -> list[Folded]:
        """What is kept."""
        return list(self._folded.values())

    def forget(self, folded: Folded) -> None:
        """Fold again at the next call."""
        for key, other in list(self._folded.items()):
            if other is folded:
                self._folded[key] = replace(folded, versions=None)

    def __call__(self, inputs: list[Any]) -> Any:
        """Run the graph; `inputs` are all of its inputs, and are emptied."""
        sources = self._select(inputs)
        key = tuple(map(id, sources))
        folded = self._folded.get(key)
        if folded is None or not folded.is_of(sources):
            folded = self._fold(key, sources)
        rest = [*folded.kept, *(inputs[index] for index in self._parts.others)]
        inputs.clear()
        return self._compiled(rest)

    def _fold(self, key: tuple[int, ...], sources: tuple[Tensor, ...]) -> Folded:
        """Make the constants: in the memory they have, so that CUDA graphs stay valid, once there is some."""
        with self._lock:
            before = self._folded.get(key)
            counters = before.counters if before is not None else _counters(sources)
            versions = _versions(sources, counters)
            with torch.inference_mode(mode=False), torch.no_grad(), _torch.no_autocast():
                made = self._parts.constants(*sources)
                if before is None:
                    kept = list(map(_torch.as_traced, made, self._parts.kept))
                else:
                    kept = [old.copy_(new) for old, new in zip(before.kept, made, strict=True)]
            folded = self._folded[key] = Folded(
                sources=before.sources if before is not None else self._watch(key, sources),
                kept=kept,
                memory=[source.untyped_storage() for source in sources],
                addresses=list(map(Tensor.data_ptr, sources)),
                counters=counters,
                versions=versions,
            )
            return folded

    def _watch(self, key: tuple[int, ...], sources: Sequence[Tensor]) -> tuple[weakref.ref[Tensor], ...]:
        """References to the sources that drop what was made of them when they end: others may get their ids."""
        this = weakref.ref(self)

        def drop(_: weakref.ref[Tensor]) -> None:
            deployed = this()
            if deployed is not None:
                deployed._folded.pop(key, None)

        return tuple(weakref.ref(source, drop) for source in sources)


def _versions(sources: Sequence[Tensor], counters: Sequence[Tensor]) -> list[int] | None:
    return _torch.versions([*sources, *counters, _fused_steps()])


def _counters(sources: Sequence[Tensor]) -> list[Tensor]:
    """num_batches_tracked of every module whose running_mean is among the sources.

    Eager batch norm in training mode counts a version for it, but none for the running statistics (torch 2.13).
    """
    ids = set(map(id, sources))
    buffers = [item for item in gc.get_objects() if type(item) is dict and id(item.get("running_mean")) in ids]
    counters = [item.get("num_batches_tracked") for item in buffers]
    return [counter for counter in counters if isinstance(counter, Tensor)]


def _selector(indices: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Tensor, ...]]:
    """What takes some of a list, quickly."""
    if len(indices) == 1:
        return lambda inputs: (inputs[indices[0]],)
    return itemgetter(*indices)


@lru_cache(maxsize=1)
def _fused_steps() -> Tensor:
    """A tensor that has a new version after every step of a fused optimizer, which counts none itself (torch 2.13)."""
    steps = torch.zeros((), device="cpu")

    def count(optimizer: Optimizer, *_: Any) -> None:
        if not torch.compiler.is_compiling() and any(group.get("fused") for group in optimizer.param_groups):
            torch.autograd.graph.increment_version(steps)

    register_optimizer_step_post_hook(count)
    return steps

"""mode="deploy": what a graph makes of weights alone is kept, and made again when one of them changes."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
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
from convbn_compile._wrapped import check_module

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
        TypeError: `model` is not a module, or one of TorchScript.

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
    check_module(model, "refresh")
    kept = kept_of(model)
    for graph, key, _ in kept:
        graph.forget(key)
    return len(kept)


def kept_of(model: nn.Module) -> list[tuple[Deployed, Key, Folded]]:
    """What is kept that was made of a parameter or buffer of the model: by which graph, and of which tensors' ids."""
    tensors = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept = [(graph, key, folded) for graph in list(_DEPLOYED) for key, folded in graph.folded().items()]
    return [item for item in kept if not tensors.isdisjoint(item[1])]


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
class Place:
    """Where a module has a source. It is the module that is referred to weakly: torch swaps no tensor that is."""

    module: weakref.ref[nn.Module]
    name: str
    index: int


@dataclass(frozen=True)
class Folded:
    """What was made of some sources, and how they were then.

    Attributes:
        kept: the constants.
        addresses: where the sources lay.
        memory: theirs, so that no other tensor gets the address.
        places: where modules have them.
        loose: sources that no module has.
        statistics: the buffers of every batch norm whose running statistics are among them.
        counts: no source may be statistics of a batch norm that could not be found.
        versions: of the sources, of num_batches_tracked, and steps of fused optimizers; None if they are not counted.
    """

    kept: list[Tensor]
    addresses: list[int]
    memory: list[UntypedStorage]
    places: list[Place]
    loose: list[weakref.ref[Tensor]]
    statistics: list[Mapping[str, Any]]
    counts: bool
    versions: list[int] | None = None

    def is_of(self, sources: Sequence[Tensor]) -> bool:
        """True if none of the sources, the same as then, was written to since."""
        return (
            self.versions is not None
            and self.versions == _versions(sources, self.statistics)
            and self.addresses == list(map(Tensor.data_ptr, sources))
            and not _torch.writes_uncounted()
        )

    def is_in_place(self, key: Key) -> bool:
        """True unless a module has another tensor, or other memory, in the place of a source."""
        for place in self.places:
            tensor: Any = getattr(place.module(), place.name, None)
            if id(tensor) != key[place.index] or tensor.data_ptr() != self.addresses[place.index]:
                return False
        return True


Key = tuple[int, ...]
"""The ids of some sources."""


class Deployed:
    """What AOTAutograd calls in place of an inference graph: keeps its constants, and looks whether they still hold.

    Before each call every source is compared with what was folded: the same tensor, version and memory. Dynamo may use
    one graph for several models of one class, so that there may be several sets of sources.
    """

    def __init__(self, parts: Split, compiled: _torch.CompiledFunction) -> None:
        self._parts = parts
        self._compiled = compiled
        self._select = _selector(parts.sources)
        self._folded: dict[Key, Folded] = {}
        self._lock = threading.Lock()
        self._boxed_call = True  # AOTAutograd's word for one that takes a list, and empties it
        _DEPLOYED.add(self)

    def folded(self) -> dict[Key, Folded]:
        """What is kept."""
        return dict(self._folded)

    def forget(self, key: Key) -> None:
        """Fold again at the next call."""
        with self._lock:
            if key in self._folded:
                self._folded[key] = replace(self._folded[key], versions=None)

    def drop(self, key: Key) -> None:
        """Keep it no longer."""
        self._folded.pop(key, None)

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

    def _fold(self, key: Key, sources: Sequence[Tensor]) -> Folded:
        """Make the constants: in the memory they have, so that CUDA graphs stay valid, once there is some."""
        with self._lock:
            before = self._folded.get(key) or self._nothing_yet(key, sources)
            versions = _versions(sources, before.statistics)
            with torch.inference_mode(mode=False), torch.no_grad():
                made = self._parts.constants(*sources)
                if before.kept:
                    kept = [old.copy_(new) for old, new in zip(before.kept, made, strict=True)]
                else:
                    kept = list(map(_torch.as_traced, made, self._parts.kept))
            self._folded[key] = folded = replace(
                before,
                kept=kept,
                addresses=list(map(Tensor.data_ptr, sources)),
                memory=[source.untyped_storage() for source in sources],
                versions=versions if before.counts else None,
            )
            return folded

    def _nothing_yet(self, key: Key, sources: Sequence[Tensor]) -> Folded:
        """Where the sources are; what is out of place meanwhile, in whichever graph, is dropped."""
        for graph in list(_DEPLOYED):
            for other, folded in graph.folded().items():
                if not folded.is_in_place(other):
                    graph.drop(other)
        this = weakref.ref(self)

        def drop(_: weakref.ref[Any]) -> None:
            if (graph := this()) is not None:
                graph.drop(key)

        places = _places(key, drop)
        owned = {place.index for place in places}
        loose = [source for index, source in enumerate(sources) if index not in owned]
        return Folded(
            kept=[],
            addresses=[],
            memory=[],
            places=places,
            loose=[weakref.ref(source, drop) for source in loose],
            statistics=_statistics(places),
            counts=all(isinstance(source, nn.Parameter) or source.ndim != 1 for source in loose),
        )


def _versions(sources: Sequence[Tensor], statistics: Sequence[Mapping[str, Any]]) -> list[int] | None:
    counters = [buffers["num_batches_tracked"] for buffers in statistics]
    return _torch.versions([*sources, *counters, _fused_steps()])


def _places(key: Key, on_end: Callable[[weakref.ref[Any]], None]) -> list[Place]:
    """Where modules have the sources; what is called if one of these modules is no more."""
    index = {number: at for at, number in enumerate(key)}
    places: list[Place] = []
    for module in [item for item in gc.get_objects() if issubclass(type(item), nn.Module)]:
        tensors = [item for kind in ("_parameters", "_buffers") for item in vars(module).get(kind, {}).items()]
        found = [(name, index[id(tensor)]) for name, tensor in tensors if id(tensor) in index]
        if found:
            reference = weakref.ref(module, on_end)
            places += [Place(reference, name, at) for name, at in found]
    return places


def _statistics(places: Sequence[Place]) -> list[Mapping[str, Any]]:
    """The buffers of every batch norm whose running_mean is among the sources.

    Eager batch norm in training mode counts a version for num_batches_tracked, but none for these (torch 2.13).
    """
    modules = [place.module() for place in places if place.name == "running_mean"]
    return [module._buffers for module in modules if module is not None and "num_batches_tracked" in module._buffers]


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

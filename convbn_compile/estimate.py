"""estimate_memory: what a model saves for backward and needs at the peak, for batches that do not fit, too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from convbn_compile import _torch
from convbn_compile._live_bytes import gradient_bytes, live_bytes
from convbn_compile._wrapped import check_module, unwrapped
from convbn_compile.lowering import lower
from convbn_compile.options import Lowering, Mode, Options
from convbn_compile.saved_bytes import kept_bytes

MIB = 2**20


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one step of forward and backward needs; memory that tensors share counts once.

    Attributes:
        saved_bytes: what is saved for backward, parameters, buffers and inputs not counted.
        peak_bytes: the most that is in use at one time: parameters, buffers, inputs, and what the graphs allocate.
        parameter_bytes: of the parameters.
        buffer_bytes: of the buffers.
        input_bytes: of the tensors that the model is called with.
        gradient_bytes: of the gradients of parameters and inputs, all of which live when backward is over.
        timeline: what is in use at each operation of forward, and then of backward; the peak is the largest.
    """

    saved_bytes: int
    peak_bytes: int
    parameter_bytes: int
    buffer_bytes: int
    input_bytes: int
    gradient_bytes: int
    timeline: tuple[int, ...] = field(repr=False)

    def to_dict(self) -> dict[str, int]:
        """Everything but the timeline."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "timeline"}

    def __str__(self) -> str:
        rows = [(name.removesuffix("_bytes"), f"{number / MIB:.2f}") for name, number in self.to_dict().items()]
        return tabulate(rows, headers=("", "MiB"), disable_numparse=True, colalign=("left", "right"))


def estimate_memory(
    model: nn.Module,
    *inputs: Any,
    mode: str = "tune",
    memory_budget: Any = 1.0,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> MemoryEstimate:
    """The bytes that a step of forward and backward takes, without running it or allocating any of them.

    The model is compiled with fake tensors as torch.compile(backend="convbn_tune") would do, up to code generation, and
    the graphs are added up. Grad mode and autocast are the caller's, but that Deploy computes no gradients.

    Args:
        model: the module, on any device, also on meta; its training flags decide which batch norms run on batch
            statistics.
        inputs: what the model is called with: real tensors, tensors on meta, or fake ones, of any size.
        mode: train, eval, tune or deploy.
        memory_budget: as in torch.compile's options.
        options: further ones, such as merge_branches.
        kwargs: as `inputs`, by name.

    Raises:
        TypeError: `model` is not a module, or one of TorchScript; an option of the wrong type.
        ValueError: an unknown mode, option or value; inputs that the model does not take; a model that is not captured
            as one graph, that cannot be copied, that has lazy parameters, or that fully_shard was applied to; autocast
            where all is on meta.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU()).eval()
        >>> print(estimate_memory(net, torch.empty(10_000, 3, 226, 226, device="meta")).saved_bytes // 2**30)
        3
    """
    check_module(model, "estimate_memory")
    parsed = Options.parse(mode, _with_budget(options, memory_budget))
    model = unwrapped(model)
    _check(model)
    lowered = _lowered(model, inputs, kwargs, replace(parsed, lowering=Lowering.AOT_EAGER))
    parameters, buffers = _storages(model.parameters()), _storages(model.buffers())
    given = _storages(_torch.tensors_in((inputs, kwargs)))
    outside = sum((parameters | buffers | given).values())
    timeline = [outside + number for graphs in lowered for number in live_bytes(graphs)]
    return MemoryEstimate(
        saved_bytes=sum(kept_bytes(graphs.forward, graphs.num_outputs) for graphs in lowered),
        peak_bytes=max(timeline, default=outside),
        parameter_bytes=sum(parameters.values()),
        buffer_bytes=sum(buffers.values()),
        input_bytes=sum(given.values()),
        gradient_bytes=sum(map(gradient_bytes, lowered)),
        timeline=tuple(timeline),
    )


def _with_budget(options: Any, memory_budget: Any) -> dict[str, Any]:
    """The options, the budget among them."""
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"options must be a dict such as {{'merge_branches': False}}, got {options!r}.")
    if options and "memory_budget" in options and memory_budget != 1.0:
        raise ValueError(
            f"memory_budget is given twice: {memory_budget!r}, and {options['memory_budget']!r} in options. Give one."
        )
    return {"memory_budget": memory_budget, **(options or {})}


def _check(model: nn.Module) -> None:
    """Refuse what has no tensors to add up, or only parts of them."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(
                f"estimate_memory needs parameters of known sizes, but {name} is lazy: call the model once before."
            )
    for name, module in model.named_modules():
        if _torch.is_fully_sharded(module):
            raise ValueError(
                f"estimate_memory does not support fully_shard, which {name or 'the model'} has: pass the model that "
                "it was applied to, as it was before. Sharded parameters are gathered and freed between the graphs."
            )


def _lowered(
    model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any], options: Options
) -> list[_torch.Lowered]:
    """The graphs that one call of the model is compiled to: one, or none if it computes nothing."""
    lowered: list[_torch.Lowered] = []
    fake_mode, fakes = _fakes(model, inputs, kwargs)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Tensor]) -> _torch.CompiledFunction:
        lower(gm, example_inputs, options, lambda _: None, on_lowered=lambda graphs: lowered.append(graphs))
        return gm.forward

    def call(fakes: Any) -> Any:
        model, inputs, kwargs = fakes
        return model(*inputs, **kwargs)

    no_grad = torch.no_grad() if options.mode is Mode.DEPLOY else contextlib.nullcontext()
    with torch.random.fork_rng(), _torch.leaving_no_trace(), fake_mode, no_grad:
        try:
            _torch.compile_apart(call, backend=backend, fullgraph=True)(fakes)
        except _torch.NOT_TRACED as error:
            _check_inputs(model, lambda: call(fakes))
            raise ValueError(
                f"estimate_memory needs a model that Dynamo captures as one graph with fake tensors, which have no "
                f"values; {type(model).__name__} it does not: {error}"
            ) from error
        finally:
            _torch.forget_compiled(call)
    found, lowered = lowered, []  # Dynamo keeps every backend
    return found


def _check_inputs(model: nn.Module, call: Callable[[], Any]) -> None:
    """Refuse inputs with which the model cannot be called at all."""
    try:
        call()
    except _torch.NEEDS_VALUES:
        return
    except Exception as error:
        raise ValueError(
            f"estimate_memory cannot call {type(model).__name__} with these inputs: {type(error).__name__}: {error}. "
            "Pass what the model itself would be called with; an argument that is called mode, memory_budget or "
            "options goes by position."
        ) from error


def _fakes(model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """The fake mode, and copies of the model and of what it is called with, on one device."""
    tensors = [*model.parameters(), *model.buffers(), *_torch.tensors_in((inputs, kwargs))]
    device = next((tensor.device for tensor in tensors if not tensor.is_meta), None)
    if device is None and any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        raise ValueError(
            "estimate_memory was called under autocast, which does nothing to tensors on meta, where the model and its "
            "inputs are: give it one of them on the device of autocast."
        )
    fake_mode = _torch.fake_mode_of(tensors)
    try:
        return fake_mode, _torch.fake_copy((model, tuple(inputs), dict(kwargs)), tensors, device, fake_mode)
    except Exception as error:
        raise ValueError(
            f"estimate_memory makes a copy of the model, with fake tensors, but {type(model).__name__} or what it is "
            f"called with cannot be copied (copy.deepcopy): {error}"
        ) from error


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """What tells the memory of tensors apart, and its bytes."""
    memory = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: _torch.size_hint(storage.nbytes()) for storage in memory}

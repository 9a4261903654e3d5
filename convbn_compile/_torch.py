"""Everything taken from private torch modules, so that a new torch breaks one file.

Written for torch 2.11 to 2.15; each function says which private name it hides.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config
import torch.distributed
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._dynamo.eval_frame import remove_from_cache
from torch._dynamo.exc import ShortenTraceback, TorchRuntimeError, Unsupported
from torch._dynamo.external_utils import wrap_inline
from torch._dynamo.pgo import get_code_state
from torch._functorch import partitioners
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, detect_fake_mode
from torch._inductor import list_mode_options, metrics
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.pattern_matcher import stable_topological_sort
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.utils import clear_caches
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
)
from torch.autograd import profiler_legacy
from torch.autograd.profiler_legacy import profile
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    autograd_would_have_decomposed,
    is_traceable_wrapper_subclass,
)
from torch.utils._pytree import tree_leaves, tree_map_only

BatchNormModule = _BatchNorm
"""The base class of nn.BatchNorm1d/2d/3d and nn.SyncBatchNorm."""

SpectralNorms = (SpectralNorm, _SpectralNorm)
"""Of torch.nn.utils, a hook of the module, and of torch.nn.utils.parametrizations, a module."""

ConvolutionModule = _ConvNd
"""The base class of nn.Conv1d/2d/3d and nn.ConvTranspose1d/2d/3d."""

DispatchMode = TorchDispatchMode
"""Sees every operator that is called inside of it."""
NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
"""What fake tensors raise where the values of real ones decide."""
NOT_TRACED = (Unsupported, TorchRuntimeError, *NEEDS_VALUES)
"""What compiling raises if a model cannot be captured, or not with its inputs."""

CompiledFunction = Callable[..., Any]
GraphPass = Callable[[fx.Graph], None]
CompileGraph = Callable[[fx.GraphModule, Sequence[Any], Sequence[int]], CompiledFunction]
"""Compiles a graph, with its inputs, and which of them are the same tensors in every call."""
CompileInference = Callable[[fx.GraphModule, Sequence[Any], Sequence[int], CompileGraph], CompiledFunction]
"""Likewise, by means of a CompileGraph."""


@dataclass(frozen=True)
class Lowered:
    """What AOTAutograd made of one Dynamo graph.

    Attributes:
        inputs: of the graph, as its nodes: parameters and buffers, too.
        forward: from the inputs, and what Deploy keeps, to the outputs and what is saved for backward.
        num_outputs: how many of forward's outputs are not there for backward.
        backward: None if there are no gradients.
    """

    inputs: Sequence[fx.Node]
    forward: fx.Graph
    num_outputs: int
    backward: fx.Graph | None = None


OnLowered = Callable[[Lowered], None]

__all__ = [
    "NEEDS_VALUES",
    "NOT_TRACED",
    "USERS_PASS",
    "BatchNormModule",
    "CompileGraph",
    "CompileInference",
    "CompiledFunction",
    "ConvolutionModule",
    "DispatchMode",
    "GraphPass",
    "Lowered",
    "OnLowered",
    "SpectralNorms",
    "allocation_peak",
    "as_traced",
    "batch_norm_ops",
    "cache_dir",
    "compile_apart",
    "compile_caches_in",
    "compile_for_any_batch",
    "compile_in_place",
    "compile_with_aot_eager",
    "compile_with_inductor",
    "composite",
    "counts_versions",
    "ddp_forward",
    "default_decompositions",
    "evaluate",
    "fake_copy",
    "fake_mode_of",
    "fake_resized",
    "forget_compiled",
    "generated_kernels",
    "get_hash_for_files",
    "guarded",
    "inductor_config",
    "inductor_presets",
    "inductor_redirected",
    "inductor_type",
    "inside_ddp",
    "is_backward",
    "is_compiled_in_place",
    "is_ddp_part",
    "is_fully_sharded",
    "is_function",
    "is_inductor_redirected",
    "is_joint",
    "is_multiple",
    "is_of_torch_nn",
    "is_operator",
    "is_script",
    "is_view",
    "keep_output_strides",
    "leaving_no_trace",
    "map_tensors",
    "mark_batch",
    "memory_budget",
    "mutated_inputs",
    "not_compiled_in_place",
    "num_forward_outputs",
    "on_fakes",
    "operators_run",
    "partition",
    "prefers_channels_last",
    "redirect_inductor",
    "reshard",
    "same_size",
    "saved_values",
    "set_memory_budget",
    "size_hint",
    "stable_topological_sort",
    "static_inputs",
    "takes_any_strides",
    "tensors_in",
    "traced_by_make_fx",
    "undo_compile",
    "undo_redirect_inductor",
    "unlimited_compiles",
    "versions",
    "visible_through_dynamo",
    "whole",
    "writes_uncounted",
]


# --- errors ------------------------------------------------------------------------------------------------------


class _VisibleValueError(ShortenTraceback, ValueError):
    """A ValueError that Dynamo hands to the user as it is, not inside a BackendCompilerFailed."""


class _VisibleTypeError(ShortenTraceback, TypeError):
    """A TypeError that Dynamo hands to the user as it is, not inside a BackendCompilerFailed."""


def visible_through_dynamo(error: ValueError | TypeError) -> ValueError | TypeError:
    """`error` as an exception of the same kind that reaches the user when it is raised inside a backend."""
    kind = _VisibleTypeError if isinstance(error, TypeError) else _VisibleValueError
    return kind(str(error), first_useful_frame=None)


# --- configuration -----------------------------------------------------------------------------------------------


def inductor_config() -> dict[str, Any]:
    """Inductor's configuration: key to current value."""
    return dict(torch._inductor.config.get_config_copy())


def inductor_type(key: str) -> Any:
    """The declared type of one of Inductor's configuration keys."""
    return torch._inductor.config.get_type(key)  # type: ignore[attr-defined]


def inductor_presets() -> dict[str, dict[str, Any]]:
    """Inductor's presets, as torch.compile(mode=...) knows them: name to configuration."""
    return dict(list_mode_options())


def compile_apart(function: Callable[..., Any], **kwargs: Any) -> CompiledFunction:
    """torch.compile with fixed sizes and, where torch can, entries that count towards no other's recompile limit.

    With `fullgraph` one of NOT_TRACED is raised where there would be a second graph.
    """
    return compile_for_any_batch(function, dynamic=False, **kwargs)


def compile_for_any_batch(function: Callable[..., Any], **kwargs: Any) -> CompiledFunction:
    """torch.compile with sizes that are fixed but where mark_batch says otherwise, apart as compile_apart."""
    apart: dict[str, Any] = {"isolate_recompiles": True} if "isolate_recompiles" in _COMPILE_ARGUMENTS else {}
    compiled: CompiledFunction = torch.compile(function, **apart, **kwargs)
    return compiled


def mark_batch(*tensors: Tensor) -> None:
    """Let dimension 0 of tensors be of any size in what is compiled for them, where the code allows it."""
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


def unlimited_compiles() -> contextlib.AbstractContextManager[Any]:
    """Dynamo compiles as many modules of one class as there are: before torch 2.13 they share a limit."""
    return torch._dynamo.config.patch(recompile_limit=2**20, accumulated_recompile_limit=2**20)  # type: ignore[no-any-return]


def forget_compiled(function: Callable[..., Any]) -> None:
    """Free what Dynamo keeps of every compile of a function, and of those that share its code."""
    remove_from_cache(function)


_COMPILE_ARGUMENTS = frozenset(inspect.signature(torch.compile).parameters)


@contextlib.contextmanager
def leaving_no_trace() -> Iterator[None]:
    """Dynamo compiles anew however often a function was compiled before, and forgets the sizes that it saw inside.

    It remembers sizes by code object, so that a frame of the model behind a graph break would be dynamic for whoever
    compiles it next. Hides: pgo.get_code_state.
    """
    sizes: dict[Any, Any] = get_code_state()
    before = copy.deepcopy(dict(sizes))
    try:
        with unlimited_compiles():
            yield
    finally:
        sizes.clear()
        sizes.update(before)


# --- decompositions ----------------------------------------------------------------------------------------------


def default_decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's own decomposition table."""
    return select_decomp_table()


@lru_cache(maxsize=1)
def batch_norm_ops() -> frozenset[Any]:
    """The operators, forward and backward, that Inductor's table would decompose and the joint pass wants whole."""
    return frozenset(op for op in default_decompositions() if "batch_norm" in str(op))


def _whole_batch_norm() -> dict[Any, Callable[..., Any]]:
    """Inductor's table without its batch-norm entries."""
    return {op: rule for op, rule in default_decompositions().items() if op not in batch_norm_ops()}


@contextlib.contextmanager
def on_fakes(fakes: Sequence[Any]) -> Iterator[None]:
    """Operators compute fake tensors inside, unseen by autograd, autocast and tracers further out."""
    fake_mode = detect_fake_mode(fakes)
    assert fake_mode is not None, "fake tensors are needed"
    with torch.no_grad(), torch._C._DisableAutocast(), disable_proxy_modes_tracing(), fake_mode:
        yield


def traced_by_make_fx(function: Callable[..., Any], fakes: Sequence[Any]) -> fx.Graph:
    """The aten graph of `function` on fake tensors, decomposed as Inductor would."""
    with on_fakes(fakes):
        return make_fx(function, default_decompositions(), tracing_mode="real")(*fakes).graph


def composite(func: Any, args: Sequence[Any]) -> CompiledFunction | None:
    """What makes an operator of others, as autograd would."""
    if func._can_decompose() and autograd_would_have_decomposed(func, tensors_in(args)):
        return func.decompose  # type: ignore[no-any-return]
    return None


def evaluate(function: Any, *values: Any, **kwargs: Any) -> Any:
    """What `function` makes of fake tensors."""
    with on_fakes(values):
        return function(*values, **kwargs)


# --- fake tensors ------------------------------------------------------------------------------------------------


def fake_mode_of(tensors: Sequence[Tensor]) -> Any:
    """The mode of those that are fake, or the active one, or a new one, which takes real tensors for fake ones."""
    return detect_fake_mode(tensors) or FakeTensorMode(allow_non_fake_inputs=True)


def fake_copy(value: Any, tensors: Sequence[Tensor], device: torch.device | None, fake_mode: Any) -> Any:
    """A deep copy all of whose tensors are fake, so that no memory is allocated for them.

    Args:
        value: a container of modules and tensors.
        tensors: its tensors.
        device: where those on meta go; None leaves them there.
        fake_mode: that of the copies.
    """
    memo: dict[int, Any] = {id(tensor): _fake(tensor, device, fake_mode) for tensor in tensors}
    with fake_mode, FakeCopyMode(fake_mode):
        return copy.deepcopy(value, memo)


def _fake(tensor: Tensor, device: torch.device | None, fake_mode: Any) -> Tensor:
    if device is None or not tensor.is_meta:
        fake: Tensor = fake_mode.from_tensor(tensor, static_shapes=True)
        return fake
    with fake_mode:
        moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        moved.requires_grad_(tensor.requires_grad)
        return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


def fake_resized(tensor: Tensor, batch: int, fake_mode: Any) -> Tensor:
    """A fake tensor like the given one, but for its size in dim 0."""
    size = (batch, *tensor.shape[1:])
    with fake_mode:
        resized = torch.empty_strided(size, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        return resized.requires_grad_(tensor.requires_grad)


# --- partitioning ------------------------------------------------------------------------------------------------


def partition(joint: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Forward and backward graph of a joint graph, by the min-cut partitioner that Inductor uses."""
    forward, backward = min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **kwargs)
    return forward, backward


class _FoundError(Exception):
    """No failure: what was looked for in the partitioner is found, and the rest of it need not run."""


def saved_values(
    joint: fx.GraphModule, budgets: Sequence[float], *, num_fwd_outputs: int
) -> dict[float, list[fx.Node]]:
    """What the partitioner would save at each memory budget; `joint` is of no use afterwards.

    The graphs are not made, and what budgets have in common is solved once. A budget that the user gave a region
    (torch.autograd.graph.region_activation_memory_budget) goes before ours: then there is nothing to choose.

    Hides: partitioners.choose_saved_values_set and solve_min_cut. While they are replaced no other thread may replace
    them: it would take ours for torch's, and put them back for good.
    """
    with _PARTITIONER:
        return _saved_values(joint, budgets, num_fwd_outputs)


_PARTITIONER = threading.RLock()
"""Held by who replaces functions of torch's partitioner."""


def _saved_values(joint: fx.GraphModule, budgets: Sequence[float], num_fwd_outputs: int) -> dict[float, list[fx.Node]]:
    found: dict[float, list[fx.Node]] = {}
    solved: dict[Any, Any] = {}
    choose_plainly, solve_plainly = partitioners.choose_saved_values_set, partitioners.solve_min_cut

    def solve(graph: fx.Graph, info: Any, options: Any, dont_ban: Any = None) -> Any:
        if graph.owning_module is not joint:  # another thread's
            return solve_plainly(graph, info, options, dont_ban)
        key = (repr(options), frozenset(dont_ban or ()))
        if key not in solved:
            solved[key] = solve_plainly(graph, info, options, dont_ban)
        return solved[key]

    def choose(graph: fx.Graph, info: Any, memory_budget: float = 1) -> Any:
        if graph.owning_module is not joint:
            return choose_plainly(graph, info, memory_budget)
        if memory_budget == torch._functorch.config.activation_memory_budget:
            found.update((budget, choose_plainly(graph, info, budget)) for budget in budgets)
        raise _FoundError

    ours = mock.patch.multiple(partitioners, choose_saved_values_set=choose, solve_min_cut=solve)
    with contextlib.suppress(_FoundError), ours:
        partition(joint, (), num_fwd_outputs=num_fwd_outputs)
    return found


def is_joint(graph: fx.Graph) -> bool:
    """True if the graph has a backward part."""
    return any(node.name.startswith("tangents_") for node in graph.find_nodes(op="placeholder"))


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists, dicts and dataclasses that torch knows."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def map_tensors(function: Callable[[Tensor], Any], values: Any) -> Any:
    """The same nested values with `function` of each tensor in its place."""
    return tree_map_only(Tensor, function, values)


def size_hint(size: int | torch.SymInt) -> int:
    """A size as a number, without a guard on it if it is dynamic: looking must not specialise the graph."""
    if isinstance(size, torch.SymInt):
        hint = size.node.hint
        return 0 if hint is None else int(hint)
    return size


def guarded(number: int | torch.SymInt) -> int | torch.SymInt:
    """A number as it is in this call, with the guard that the graph is compiled anew for another one.

    One that depends on data, which allows no guard, stays what it is.
    """
    return int(number) if isinstance(number, torch.SymInt) and number.node.has_hint() else number


def same_size(first: int | torch.SymInt, second: int | torch.SymInt) -> bool:
    """True if two sizes are known to be equal, without a guard on it; (a - 2) * (b - 2) may come multiplied out."""
    if statically_known_true(first == second):
        return True
    difference = first - second
    return isinstance(difference, torch.SymInt) and bool(difference.node.expr.expand() == 0)


def is_multiple(size: int | torch.SymInt, number: int) -> bool:
    """True if a size is known to be a multiple of a number, and not 0, without a guard on it."""
    return statically_known_true(size % number == 0) and statically_known_true(size > 0)


def is_operator(node: fx.Node) -> bool:
    """True if the node calls an operator of torch's dispatcher, not a Python function or a graph inside."""
    return isinstance(node.target, OpOverload)


def is_view(node: fx.Node) -> bool:
    """True if the node's output shares its input's memory."""
    return isinstance(node.target, OpOverload) and node.target.is_view


def is_backward(node: fx.Node) -> bool:
    """True if autograd wrote the node, on its way back."""
    return node.meta.get("partitioner_tag") == "is_backward"


def mutated_inputs(joint: fx.Graph) -> list[fx.Node]:
    """The inputs that the forward part writes to, in the graph (copy_) or after it (as an extra output)."""
    written = {node.args[0] for node in joint.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)}
    descs = joint.output_node().meta.get("desc") or []
    after = [desc.mutated_input for desc in descs if type(desc).__name__ == "InputMutationAOTOutput"]
    return [node for node in joint.find_nodes(op="placeholder") if node in written or node.meta.get("desc") in after]


def num_forward_outputs(joint: fx.Graph) -> int:
    """How many outputs of a joint graph belong to its forward part (the rest are gradients)."""
    output = next(node for node in reversed(joint.nodes) if node.op == "output")
    kinds = [type(desc).__name__ for desc in output.meta["desc"]]
    gradients = [index for index, kind in enumerate(kinds) if kind in ("GradAOTOutput", "NoneType")]
    return gradients[0] if gradients else len(kinds)


# --- deploy ------------------------------------------------------------------------------------------------------


def static_inputs() -> list[int]:
    """Which inputs of the graph that is being compiled are parameters and buffers, the same tensors in every call.

    Hides: TracingContext.fw_metadata.
    """
    context = TracingContext.try_get()
    return [] if context is None or context.fw_metadata is None else list(context.fw_metadata.static_input_indices)


def counts_versions(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """False if a Dynamo graph reads tensors that by their version never change.

    Parameters that fully_shard gathers are such, and tensors inside of others (subclasses such as DTensor). Hides: the
    sources of Dynamo's placeholders; guard_source is a method in torch 2.11.
    """
    if any(map(is_traceable_wrapper_subclass, inputs)):
        return False
    sources = [getattr(node, "_dynamo_source", None) for node in gm.graph.find_nodes(op="placeholder")]
    kinds = [source.guard_source for source in sources if source is not None]
    return not any((kind() if callable(kind) else kind).is_fsdp_module() for kind in kinds)


def is_function(node: fx.Node) -> bool:
    """True if the node calls an operator of torch's that gives the same for the same input, and writes to nothing."""
    target = node.target
    return (
        isinstance(target, OpOverload)
        and target.namespace in ("aten", "prims")
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
    )


_VERSION = attrgetter("_version")


def versions(tensors: Sequence[Tensor | None]) -> list[int] | None:
    """How often each tensor was written to; None if torch does not keep count: of inference tensors, or of None."""
    try:
        return list(map(_VERSION, tensors))
    except (RuntimeError, AttributeError):
        return None


def writes_uncounted() -> bool:
    """True inside DistributedDataParallel's forward, if that sends buffers, of which it counts no version."""
    if not torch.distributed.is_available():
        return False
    wrapper: Any = DistributedDataParallel._active_ddp_module
    return wrapper is not None and bool(wrapper.will_sync_module_buffers())


def prefers_channels_last(module: fx.GraphModule) -> bool:
    """True if Inductor will have convolutions of the graph in channels_last. Hides: GraphLowering.decide_layout_opt."""
    return GraphLowering.decide_layout_opt(module, is_inference=True)


def takes_any_strides(node: fx.Node) -> bool:
    """True for torch's own operators, but for those that read memory as it lies."""
    target = node.target
    return isinstance(target, OpOverload) and target.namespace in ("aten", "prims") and "as_strided" not in str(target)


def keep_output_strides(graph: fx.Graph) -> None:
    """Have Inductor give what a graph computes in the strides that it was traced with.

    Hides: prims.inductor_force_stride_order, which freezing uses likewise.
    """
    output = graph.output_node()
    for node in output.all_input_nodes:
        traced = node.meta["val"]
        mutates = isinstance(node.target, OpOverload) and node.target._schema.is_mutable
        if node.op == "call_function" and not mutates and isinstance(traced, Tensor):
            with graph.inserting_before(output):
                strides = tuple(getattr(graph, "materialize_symints", tuple)(traced.stride()))  # not in torch 2.11
                forced = graph.call_function(torch.ops.prims.inductor_force_stride_order.default, (node, strides))
            forced.meta = dict(node.meta)
            output.replace_input_with(node, forced)


def as_traced(tensor: Tensor, traced: Tensor) -> Tensor:
    """The tensor in memory of its own, with the strides that a graph was traced with."""
    made = torch.empty_strided(traced.shape, traced.stride(), dtype=traced.dtype, device=tensor.device)
    return made.copy_(tensor)


# --- lowering ----------------------------------------------------------------------------------------------------


class _CachedPass(CustomGraphPass):
    """Passes over the joint graph in order, with one identity for the compile caches."""

    def __init__(self, passes: Sequence[GraphPass], uuid: Any) -> None:
        self.passes = passes
        self._uuid = uuid

    def __call__(self, graph: fx.Graph) -> None:
        module = graph.owning_module
        for graph_pass in self.passes:
            graph_pass(module.graph if module is not None else graph)

    def uuid(self) -> Any:
        return self._uuid


USERS_PASS = "joint_custom_pre_pass"
"""Inductor's configuration key for passes over the joint graph."""


def _chain(ours: GraphPass, uuid: str, config: Mapping[str, Any]) -> _CachedPass:
    """Our pass, then whatever passes the user had configured; not cacheable unless all of theirs are."""
    theirs = config.get(USERS_PASS, getattr(torch._inductor.config, USERS_PASS))
    others = () if theirs is None else tuple(theirs) if isinstance(theirs, (list, tuple)) else (theirs,)
    uuids = [other.uuid() if isinstance(other, CustomGraphPass) else None for other in others]
    return _CachedPass((ours, *others), None if None in uuids else (uuid, *uuids))


def _inner_compile(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    last_pass: GraphPass,
    on_inference: CompileInference | None,
    **kwargs: Any,
) -> Any:
    """Inductor's inner compiler with its own table back: ours does not pickle, which bypasses the FX-graph cache."""
    if "get_decomp_fn" in kwargs:
        kwargs["get_decomp_fn"] = select_decomp_table
    _save_inputs_as_they_are(gm.graph)
    if kwargs.get("is_backward"):
        _lay_memory_out_like(inputs, gm.graph)
    if on_inference is None or not kwargs.get("is_inference"):
        last_pass(gm.graph)
        return compile_fx_inner(gm, inputs, **kwargs)

    def compile_graph(part: fx.GraphModule, part_inputs: Sequence[Any], static: Sequence[int]) -> Any:
        return compile_fx_inner(part, part_inputs, **{**kwargs, "static_input_idxs": static})

    return on_inference(gm, inputs, kwargs["static_input_idxs"], compile_graph)


def _save_inputs_as_they_are(forward: fx.Graph) -> None:
    """Keep the layout of inputs that are saved for backward, weights above all.

    Inductor would turn those that convolutions read into channels_last, and save the copies (torch 2.13, graph.py,
    nodes_prefer_channels_last), unless they are outputs that the user sees.
    """
    output = forward.output_node()
    outputs = output.args[0]
    visible = output.meta.get("user_visible_output_idxs")
    if isinstance(outputs, (list, tuple)) and visible is not None:
        inputs = [index for index, node in enumerate(outputs) if isinstance(node, fx.Node) and node.op == "placeholder"]
        output.meta["user_visible_output_idxs"] = sorted({*visible, *inputs})


def _lay_memory_out_like(inputs: Sequence[Any], backward: fx.Graph) -> None:
    """Unwritten memory in channels_last if forward saved something of that rank so.

    Convolutions choose their layout by it, as they would by the input that it stands for (torch 2.13).
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    saved = [item for item in inputs if isinstance(item, Tensor) and item.dim() in formats]
    ranks = {item.dim() for item in saved if _is_only_in(item, formats[item.dim()])}
    for node in backward.find_nodes(op="call_function", target=torch.ops.aten.empty_strided.default):
        memory = node.meta["val"]
        stands_in = all(user.target is torch.ops.aten.convolution_backward.default for user in node.users)
        if stands_in and memory.dim() in ranks and all(isinstance(size, int) for size in memory.shape):
            node.update_arg(1, list(torch.empty_like(memory, memory_format=formats[memory.dim()]).stride()))


def _is_only_in(tensor: Tensor, memory_format: torch.memory_format) -> bool:
    return tensor.is_contiguous(memory_format=memory_format) and not tensor.is_contiguous()


def compile_with_inductor(
    gm: fx.GraphModule,
    inputs: Sequence[Tensor],
    *,
    joint_pass: GraphPass | None,
    last_pass: GraphPass,
    uuid: str,
    config: Mapping[str, Any],
    memory_budget: float | str,
    on_inference: CompileInference | None = None,
) -> CompiledFunction:
    """Compile a Dynamo graph with Inductor, `joint_pass` run first on the joint (or inference) graph.

    If there is a `joint_pass`, `last_pass` is run on forward and backward. `on_inference` is handed each inference
    graph, in place of that and of Inductor's inner compiler.

    Hides: compile_fx, config.joint_custom_pre_pass, functorch's activation_memory_budget.
    """
    patches = dict(config)
    if joint_pass is None:
        arguments: dict[str, Any] = {}
    else:
        patches[USERS_PASS] = _chain(joint_pass, uuid, config)
        arguments = {
            "decompositions": _whole_batch_norm(),
            "inner_compile": partial(_inner_compile, last_pass=last_pass, on_inference=on_inference),
        }
    with _budget(memory_budget):
        compiled: Any = compile_fx(gm, inputs, config_patches=patches, **arguments)
    return compiled  # type: ignore[no-any-return]


def compile_with_aot_eager(
    gm: fx.GraphModule,
    inputs: Sequence[Tensor],
    *,
    joint_pass: GraphPass | None,
    config: Mapping[str, Any],
    memory_budget: float | str,
    on_inference: CompileInference | None = None,
    on_lowered: OnLowered = lambda _: None,
) -> CompiledFunction:
    """Compile a Dynamo graph with AOTAutograd and run its graphs as they are, without code generation.

    `on_lowered` is told what is run. Of `config`, Inductor's, only the user's own joint pass has an effect. Without a
    `joint_pass` batch norms are decomposed from the start: whole ones run as eager's kernels, whose strides may not
    be those traced. Hides: aot_autograd.
    """
    passes = _chain(joint_pass or (lambda _: None), "", config)

    def inference(graph_module: fx.GraphModule, graph_inputs: Sequence[Any]) -> CompiledFunction:
        _on_every_graph(passes, graph_module)
        given = graph_module.graph.find_nodes(op="placeholder")

        def compile_graph(part: fx.GraphModule, *_: Any) -> CompiledFunction:
            outputs: Any = part.graph.output_node().args[0]
            on_lowered(Lowered(given, part.graph, len(outputs)))
            return _as_is(part)

        if on_inference is None:
            return compile_graph(graph_module)
        return on_inference(graph_module, graph_inputs, static_inputs(), compile_graph)

    def partition_joint(joint: fx.GraphModule, joint_inputs: Sequence[Any], **kwargs: Any) -> Any:
        _on_every_graph(passes, joint)
        forward, backward = partition(joint, joint_inputs, **kwargs)
        given = forward.graph.find_nodes(op="placeholder")
        on_lowered(Lowered(given, forward.graph, kwargs["num_fwd_outputs"], backward.graph))
        return forward, backward

    backend = aot_autograd(
        fw_compiler=lambda graph_module, _: _as_is(graph_module),
        inference_compiler=inference,
        partition_fn=partition_joint,
        decompositions=_whole_batch_norm() if joint_pass else default_decompositions(),
        keep_inference_input_mutations=True,
    )
    with _budget(memory_budget):
        compiled: CompiledFunction = backend(gm, inputs)
    return compiled


def _on_every_graph(passes: GraphPass, graph_module: fx.GraphModule) -> None:
    """Run passes on the graphs inside, such as the branches of torch.cond, as Inductor does, and then on the graph."""
    called = {node.target for node in graph_module.graph.find_nodes(op="get_attr")}
    for name, inner in graph_module.named_children():
        if name in called and isinstance(inner, fx.GraphModule):
            _on_every_graph(passes, inner)
    passes(graph_module.graph)


def _as_is(graph_module: fx.GraphModule) -> CompiledFunction:
    """What runs a graph and, as Inductor's code does, frees each of its inputs after the last use."""
    boxed: CompiledFunction = boxed_nop(graph_module, [])
    return boxed


@contextlib.contextmanager
def _budget(memory_budget: float | str) -> Iterator[None]:
    """AOTAutograd's activation memory budget, for one compile; 1.0 leaves what the user configured.

    A name in its place has the partitioner recompute whatever it does not think expensive, within no budget.
    """
    config = torch._functorch.config
    if memory_budget == 1.0:
        patched: Any = contextlib.nullcontext()
    elif isinstance(memory_budget, str):
        patched = config.patch({"activation_memory_budget": 1.0, "aggressive_recomputation": True})
    else:
        patched = config.patch(activation_memory_budget=memory_budget)
    with patched:
        yield


def memory_budget() -> float:
    """AOTAutograd's budget, of the compile that is going on or as the user configured it."""
    return float(torch._functorch.config.activation_memory_budget)


def set_memory_budget(level: float) -> None:
    """Another level of AOTAutograd's budget for the rest of a compile that was given one."""
    torch._functorch.config.activation_memory_budget = level


def compile_in_place(module: nn.Module, **kwargs: Any) -> None:
    """nn.Module.compile(), also where that silently does nothing: for modules of torch.nn itself, as nn.Sequential.

    Dynamo skips frames of torch.nn's own code unless they are inlined into another; torch.compile(module) inlines
    them by the same wrap_inline (torch 2.13, eval_frame.py).
    """
    module.compile(**kwargs)
    if is_of_torch_nn(module):
        module._compiled_call_impl = torch.compile(wrap_inline(module._call_impl), **kwargs)


def is_of_torch_nn(module: nn.Module) -> bool:
    """True if the module's forward is code of torch.nn itself, whose frames Dynamo skips."""
    return (type(module).forward.__module__ or "").startswith("torch.nn.")


def is_compiled_in_place(module: nn.Module) -> bool:
    """True after nn.Module.compile(). Hides: nn.Module._compiled_call_impl."""
    return module._compiled_call_impl is not None


@contextlib.contextmanager
def not_compiled_in_place(module: nn.Module) -> Iterator[None]:
    """No part of the module is compiled in place inside."""
    compiled = [(part, part._compiled_call_impl) for part in module.modules() if is_compiled_in_place(part)]
    try:
        for part, _ in compiled:
            undo_compile(part)
        yield
    finally:
        for part, call in compiled:
            part._compiled_call_impl = call


def undo_compile(module: nn.Module) -> None:
    """Take nn.Module.compile() back."""
    module.__dict__.pop("_compiled_call_impl", None)


# --- benchmarks --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def compile_caches_in(folder: Path) -> Iterator[None]:
    """Inside, the compile caches are on, in a folder of their own, and nothing else is known of earlier compiles.

    Hides: inductor.utils.clear_caches, and what turns the caches on.
    """
    places = {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
    before = {name: os.environ.get(name) for name in places}
    on = torch._inductor.config.patch(fx_graph_cache=True, fx_graph_remote_cache=False)
    os.environ.update(places)
    clear_caches()
    try:
        with on, torch._functorch.config.patch(enable_autograd_cache=True):
            yield
    finally:
        clear_caches()
        for name in places:
            os.environ.pop(name)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def generated_kernels(function: Callable[[], Any]) -> tuple[Any, int]:
    """What a function returns, and how many kernels Inductor generated meanwhile. Hides: inductor.metrics."""
    before = metrics.generated_kernel_count
    result = function()
    return result, metrics.generated_kernel_count - before


def operators_run(function: Callable[[], Any]) -> Counter[str]:
    """How often each operator ran meanwhile, compiled or not, those inside of others included.

    Hides: profiler_legacy, which unlike its successor writes nothing to stderr.
    """
    with profile() as events:  # type: ignore[no-untyped-call]
        function()
    return Counter(event.name for event in events.function_events)


def allocation_peak(function: Callable[[], Any]) -> int:
    """By how many bytes the tensors on the CPU, and what operators allocate inside, rise at most while it runs.

    Hides: the records of profiler_legacy, which come in order and write nothing to stderr.
    """
    legacy: Any = profiler_legacy
    legacy._enable_profiler_legacy(profile(profile_memory=True).config())  # type: ignore[no-untyped-call]
    try:
        function()
    finally:
        threads = legacy._disable_profiler_legacy()
    start = next(record for records in threads for record in records if record.name() == "__start_profile")
    changes = [
        (start.cpu_elapsed_us(record), record.cpu_memory_usage())
        for records in threads
        for record in records
        if record.kind() == "memory_alloc"
    ]
    most: int = max(accumulate((change for _, change in sorted(changes, key=itemgetter(0))), initial=0))
    return most


# --- torch.compile(backend="inductor") ---------------------------------------------------------------------------


CompileDynamoGraph = Callable[[fx.GraphModule, Sequence[Tensor], Mapping[str, Any]], CompiledFunction]
"""From a Dynamo graph, its inputs and Inductor's configuration for this compile to a callable."""


class _InductorKind(type):
    """What stands in for a class of Inductor's: every instance of the class it replaces passes for one of its own.

    Attributes:
        plain: the class it replaces.
        below: what was there before it, which may be another stand-in.
        within: the stand-in of the inductor_redirected() that it was put there in, and does not outlive.
        ended: its inductor_redirected() is over.
    """

    plain: type
    below: type
    within: _InductorKind | None = None
    ended: bool = False

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.plain)

    @property
    def is_over(cls) -> bool:
        return cls.ended or (cls.within is not None and cls.within.is_over)


def redirect_inductor(compile_graph: CompileDynamoGraph, config: Mapping[str, Any]) -> None:
    """From now on, whatever torch.compile(backend="inductor") is called on is compiled by `compile_graph`.

    torch.compile makes one _TorchCompileInductorWrapper per call, by that name, and Dynamo calls it with each graph
    (torch 2.11 to 2.15); so what was compiled before stays as it is, and what is compiled now stays redirected.

    Args:
        compile_graph: called with each graph; two that are equal share Dynamo's compiled code.
        config: Inductor's configuration where the call of torch.compile itself says nothing else.
    """
    below: Any = torch._TorchCompileInductorWrapper
    kind = _put(compile_graph, config)
    kind.within = below if isinstance(below, _InductorKind) else None


def _put(compile_graph: CompileDynamoGraph, config: Mapping[str, Any]) -> _InductorKind:
    """Put a stand-in where torch.compile finds it."""
    kind = _redirected(compile_graph, config)
    kind.below = torch._TorchCompileInductorWrapper
    torch._TorchCompileInductorWrapper = kind  # type: ignore[misc, assignment]
    return kind


def _redirected(compile_graph: CompileDynamoGraph, config: Mapping[str, Any]) -> _InductorKind:
    """A stand-in for Inductor's wrapper whose instances compile with `compile_graph`."""
    plain_wrapper: Any = _plain_wrapper()

    class Redirected(plain_wrapper, metaclass=_InductorKind):  # type: ignore[misc]
        plain = plain_wrapper
        config: dict[str, Any]

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.compile_graph = compile_graph

        def apply_mode(self, mode: str | None) -> None:
            """Called first of all, so that what torch does about a configuration it does about ours, too."""
            self.config.update(config)
            super().apply_mode(mode)

        def __call__(
            self, gm: fx.GraphModule, inputs: Sequence[Tensor], *, config_patches: Mapping[str, Any] | None = None
        ) -> CompiledFunction:
            return self.compile_graph(gm, inputs, {**self.config, **(config_patches or {})})

        def __eq__(self, other: object) -> bool:
            """Dynamo reuses compiled code where backends are equal."""
            theirs = getattr(other, "compile_graph", None)
            return bool(self.compile_graph == theirs and super().__eq__(other))

        def __reduce__(self) -> tuple[Any, ...]:
            """Whoever loads it has no Redirected, and makes one."""
            return _restore_redirected, (self.__dict__,)

    return Redirected


def _restore_redirected(attributes: dict[str, Any]) -> Any:
    """The inverse of pickling a redirected wrapper."""
    kind: Any = _redirected(attributes["compile_graph"], {})
    wrapper = kind.__new__(kind)
    wrapper.__dict__.update(attributes)
    return wrapper


def is_inductor_redirected() -> bool:
    """True after redirect_inductor, until it is undone."""
    return isinstance(torch._TorchCompileInductorWrapper, _InductorKind)


def undo_redirect_inductor() -> None:
    """Take redirect_inductor back, however often it was called."""
    torch._TorchCompileInductorWrapper = _plain_wrapper()  # type: ignore[misc]


def _plain_wrapper() -> Any:
    """The class that was there before any redirection."""
    wrapper = torch._TorchCompileInductorWrapper
    return wrapper.plain if isinstance(wrapper, _InductorKind) else wrapper


@contextlib.contextmanager
def inductor_redirected(compile_graph: CompileDynamoGraph, config: Mapping[str, Any]) -> Iterator[None]:
    """redirect_inductor inside; afterwards everything is as it was before, an outer redirection included.

    One that began inside and is not over holds on: that of another thread, or of a generator.
    """
    kind = _put(compile_graph, config)
    try:
        yield
    finally:
        kind.ended = True
        found: Any = torch._TorchCompileInductorWrapper
        found = found if isinstance(found, _InductorKind) else kind.below
        while isinstance(found, _InductorKind) and found.is_over:
            found = found.below
        torch._TorchCompileInductorWrapper = found  # type: ignore[misc]


# --- torch.distributed -------------------------------------------------------------------------------------------


def inside_ddp(module: nn.Module) -> nn.Module:
    """The module that DistributedDataParallel wraps; any other module itself."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def ddp_forward(module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Inside, Dynamo splits graphs as it does in DistributedDataParallel's forward, if `module` is one.

    Hides: DistributedDataParallel._inside_ddp_forward, which communicates nothing.
    """
    if isinstance(module, DistributedDataParallel):
        return module._inside_ddp_forward()
    return contextlib.nullcontext()


def is_ddp_part(gm: fx.GraphModule) -> bool:
    """True if a Dynamo graph is one of several that DDPOptimizer split a graph into. Hides: compile_subgraph_reason."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason is not None and reason.reason.startswith("DDPOptimizer")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is sharded over ranks, which all ranks must ask for; any other tensor itself."""
    if not torch.distributed.is_available():
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_script(module: nn.Module) -> bool:
    """True for TorchScript's modules."""
    return isinstance(module, torch.jit.ScriptModule)


def is_fully_sharded(module: nn.Module) -> bool:
    """True after torch.distributed.fsdp.fully_shard(module)."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Give what fully_shard was applied to its sharded parameters back, which else it would do in backward."""
    for module in model.modules():
        if is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]

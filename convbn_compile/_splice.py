"""Write a tensor function into a graph: the algebra exists once, as a function, and is traced and inserted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import getitem
from typing import Any

from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils.checkpoint import CheckpointPolicy

from convbn_compile import _torch
from convbn_compile._aten import aten, convert_element_type, value
from convbn_compile._layout import same_sizes
from convbn_compile._trace import Traces, trace

_OF_THE_VALUE = ("val", "tensor_meta", "original_aten", "eager_input_vals", "from_node")


def splice(
    function: Callable[..., Any],
    *arguments: Node | None,
    before: Node,
    like: Node | None = None,
    recompute: bool = False,
    traces: Traces | None = None,
) -> list[Node | None]:
    """Insert what `function` does, decomposed as Inductor would, and return the nodes of its outputs.

    Args:
        function: takes one tensor or None for each argument, returns a tensor, None, or a tuple of them.
        arguments: the nodes that stand for the function's arguments.
        before: where the new nodes go.
        like: whose source line, module path and region the new nodes take over; `before` if not given.
        recompute: the new nodes are never saved for backward but computed again there.
        traces: where the function may have been traced before.
    """
    graph, like = before.graph, like or before
    fakes = [None if argument is None else argument.meta["val"] for argument in arguments]
    traced = trace(function, fakes) if traces is None else traces.of(function, fakes)
    placed: dict[Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), arguments, strict=True))
    inherited = {key: item for key, item in like.meta.items() if key not in _OF_THE_VALUE}
    if recompute:
        inherited["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        inherited.setdefault("ac_graph_id", 0)
    with graph.inserting_before(before):
        for node in traced.graph.nodes:
            if node.op == "call_function":
                placed[node] = graph.node_copy(node, placed.__getitem__)
                placed[node].meta = {**inherited, "val": traced.fakes[node]}
            assert node.op in ("placeholder", "call_function", "output"), f"cannot splice {node.format_node()}"
    outputs = traced.graph.output_node().args[0]
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return [None if output is None else placed[output] for output in outputs]  # type: ignore[index]


def replace(old: Node, new: Node) -> None:
    """Let every reader of `old` read `new`, a wider version of the same tensor; cast where a reader needs it."""
    dtype, wide = value(old).dtype, value(new).dtype
    assert value(old).shape == value(new).shape, f"{old.name}: {value(old).shape} became {value(new).shape}"
    if dtype != wide:
        for user in list(old.users):
            if user.target is convert_element_type and user.args[1] == wide:
                reconnect(user.users, user, new)
                user.graph.erase_node(user)
    if not old.users:
        return
    if dtype != wide:
        new = _cast(new, old)
    reconnect(old.users, old, new)


def reconnect(readers: Iterable[Node], old: Node, new: Node) -> None:
    """Let readers of `old` read `new`, and note it if that lies otherwise in memory."""
    moved = not same_sizes(value(old).stride(), value(new).stride())
    for reader in tuple(readers):
        if moved:
            reader.meta[_RESTRIDE] = True
        reader.replace_input_with(old, new)


_RESTRIDE = "convbn_compile: an input lies otherwise in memory than this was traced for"


def restride(graph: Graph) -> None:
    """Find the strides of what was made of tensors that were replaced; reshape where no view has the sizes.

    The graph must be in order.

    Raises:
        RuntimeError: what an operator computes depends on how its input lay in memory.
    """
    for node in graph.nodes:
        if not node.meta.pop(_RESTRIDE, False) or not (_torch.is_operator(node) or node.target is getitem):
            continue
        if "as_strided" in str(node.target):
            raise RuntimeError(f"{node.name} reads memory that is laid out otherwise after folding")
        fake = _done(node, node.args, node.kwargs)
        before, after = _torch.tensors_in(node.meta["val"]), _torch.tensors_in(fake)
        if any(not same_sizes(mine.stride(), theirs.stride()) for mine, theirs in zip(before, after, strict=True)):
            node.meta["val"] = fake
            for user in node.users:
                user.meta[_RESTRIDE] = True


def reapply(node: Node, source: Node, *, before: Node) -> Node:
    """Insert what `node` does to its first argument, done to `source`, which may lie otherwise in memory."""
    args = (source, *node.args[1:])
    with node.graph.inserting_before(before):
        copied = node.graph.call_function(node.target, args, dict(node.kwargs))  # type: ignore[arg-type]
    copied.meta = {key: item for key, item in node.meta.items() if key not in _OF_THE_VALUE}
    copied.meta["val"] = _done(copied, args, node.kwargs)
    return copied


def _done(node: Node, args: Any, kwargs: Any) -> Any:
    """What a node makes of its arguments; it becomes a reshape if it is a view that there is none of."""
    fake_args, fake_kwargs = map_arg((args, kwargs), lambda argument: argument.meta["val"])
    try:
        return _torch.evaluate(node.target, *fake_args, **fake_kwargs)
    except (RuntimeError, ValueError):
        assert node.target in _VIEWS, f"{node.name} cannot be done to its arguments"
        node.target = aten.reshape.default
        return _torch.evaluate(node.target, *fake_args, **fake_kwargs)


_VIEWS = (aten.view.default, aten._unsafe_view.default)


def _cast(new: Node, old: Node) -> Node:
    """`new` in the dtype of `old`, placed right after `new`."""
    dtype = value(old).dtype
    after = new.next
    (cast,) = splice(lambda tensor: tensor.to(dtype), new, before=after, like=old)
    assert cast is not None
    return cast


def copy_graph(graph: Graph) -> Graph:
    """A copy that can be rewritten, and thrown away if that fails; its nodes share the originals' fake tensors."""
    copied = Graph(owning_module=graph.owning_module, tracer_cls=graph._tracer_cls)
    copied.set_codegen(graph._codegen)
    placed: dict[Node, Node] = {}
    for node in graph.nodes:
        placed[node] = copied.node_copy(node, placed.__getitem__)
    return copied


def cancel_aliases(graph: Graph) -> None:
    """alias(a) = a, unless the graph returns it: what autograd keeps of an output that its own backward reads."""
    for target in (aten.alias.default, aten.detach.default):
        for node in graph.find_nodes(op="call_function", target=target):
            if not any(user.op == "output" for user in node.users):
                node.replace_all_uses_with(node.args[0])


def share_casts(graph: Graph) -> None:
    """One node for casts of one tensor to one dtype, so that branches under autocast have one input."""
    for node in graph.nodes:
        first: dict[Any, Node] = {}
        for cast in [user for user in node.users if user.target is convert_element_type]:
            shared = first.setdefault(cast.args[1], cast)
            if shared is not cast:
                cast.replace_all_uses_with(shared)

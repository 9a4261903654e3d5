"""Write a tensor function into a graph: the algebra exists once, as a function, and is traced and inserted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils.checkpoint import CheckpointPolicy

from convbn_compile import _torch
from convbn_compile._aten import aten, convert_element_type, value

_OF_THE_VALUE = ("val", "tensor_meta", "original_aten", "eager_input_vals", "from_node")


def splice(
    function: Callable[..., Any],
    *arguments: Node | None,
    before: Node,
    like: Node | None = None,
    recompute: bool = False,
) -> list[Node | None]:
    """Insert what `function` does, decomposed as Inductor would, and return the nodes of its outputs.

    Args:
        function: takes one tensor or None for each argument, returns a tensor, None, or a tuple of them.
        arguments: the nodes that stand for the function's arguments.
        before: where the new nodes go.
        like: whose source line, module path and region the new nodes take over; `before` if not given.
        recompute: the new nodes are never saved for backward but computed again there.
    """
    graph, like = before.graph, like or before
    nodes = [argument for argument in arguments if argument is not None]

    def of_tensors(*tensors: Any) -> Any:
        rest = iter(tensors)
        return function(*(None if argument is None else next(rest) for argument in arguments))

    traced = _torch.trace(of_tensors, *(node.meta["val"] for node in nodes)).graph
    placed = dict(zip(traced.find_nodes(op="placeholder"), nodes, strict=True))
    inherited = {key: item for key, item in like.meta.items() if key not in _OF_THE_VALUE}
    with graph.inserting_before(before):
        for node in traced.nodes:
            if node.op == "call_function":
                placed[node] = _copy(node, graph, placed, inherited, recompute=recompute)
            assert node.op in ("placeholder", "call_function", "output"), f"cannot splice {node.format_node()}"
    outputs = traced.output_node().args[0]
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return [None if output is None else placed[output] for output in outputs]


def _copy(node: Node, graph: Graph, placed: dict[Node, Node], inherited: dict[str, Any], *, recompute: bool) -> Node:
    """Copy one traced node into `graph`."""
    copied = graph.node_copy(node, placed.__getitem__)
    copied.meta = {**inherited, **{key: node.meta[key] for key in _OF_THE_VALUE if key in node.meta}}
    if recompute:
        copied.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        copied.meta.setdefault("ac_graph_id", 0)
    return copied


def replace(old: Node, new: Node) -> None:
    """Let every reader of `old` read `new`, a wider version of the same tensor; cast where a reader needs it."""
    dtype, wide = value(old).dtype, value(new).dtype
    assert value(old).shape == value(new).shape, f"{old.name}: {value(old).shape} became {value(new).shape}"
    if dtype != wide:
        for user in list(old.users):
            if user.target is convert_element_type and user.args[1] == wide:
                user.replace_all_uses_with(new)
                user.graph.erase_node(user)
    if not old.users:
        return
    if dtype != wide:
        new = _cast(new, old)
    old.replace_all_uses_with(new)


def reapply(node: Node, source: Node, *, before: Node) -> Node:
    """Insert what `node` does to its first argument, done to `source`, which may lie otherwise in memory."""
    target, args = node.target, (source, *node.args[1:])
    fake_args, fake_kwargs = map_arg((args, node.kwargs), lambda argument: argument.meta["val"])
    try:
        fake = _torch.evaluate(target, *fake_args, **fake_kwargs)
    except (RuntimeError, ValueError):  # no view of it has these sizes
        assert target is aten.view.default, f"{node.name} cannot be done to {source.name}"
        target = aten.reshape.default
        fake = _torch.evaluate(target, *fake_args, **fake_kwargs)
    with node.graph.inserting_before(before):
        copied = node.graph.call_function(target, args, dict(node.kwargs))  # type: ignore[arg-type]
    copied.meta = {key: item for key, item in node.meta.items() if key not in _OF_THE_VALUE}
    copied.meta["val"] = fake
    return copied


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

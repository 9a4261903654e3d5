"""The pass over one joint (or inference) graph: fold what can be folded, decompose the rest, report. No algebra."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from convbn_compile import _torch, cost
from convbn_compile._aten import BatchNorm, batch_norms
from convbn_compile._splice import cancel_aliases, cancel_inverse_views, copy_graph, splice
from convbn_compile.identities import batch_norm_of_convolution, crop_of_pad, mask_of_clamp
from convbn_compile.report import NoMatch, Refusal, Report, Rewrite


def run(graph: Graph, *, folds: bool = True) -> Report:
    """Rewrite the graph of a GraphModule; afterwards it holds no whole batch norm any more.

    The rewriting is done on a copy: if any of it fails, the graph stays as it was and a warning says so.

    Args:
        graph: a joint or inference graph with whole batch norms; its module gets the rewritten one.
        folds: False only decomposes, which makes the graph that plain Inductor would have.
    """
    module = graph.owning_module
    assert module is not None, "the joint pass needs a graph that a module owns"
    try:
        rewritten = copy_graph(graph)
        report = fold(rewritten) if folds else Report()
        decompose_batch_norms(rewritten)
        if folds:
            save_reads_of_mutated_inputs(rewritten)
        rewritten.lint()
    except Exception as error:  # noqa: BLE001  a user's training never dies of our optimisation
        _warn_of(error)
        report = _refuse_all(graph, f"the pass failed: {type(error).__name__}: {error}")
        decompose_batch_norms(graph)
        module.recompile()
        return report
    module.graph = rewritten
    return report


def fold(graph: Graph) -> Report:
    """Fold every batch norm that can be folded; lint-free, with whole batch norms where not."""
    cancel_aliases(graph)
    cancel_inverse_views(graph)
    graph.eliminate_dead_code()
    rewrites: list[Rewrite] = []
    refused: list[Refusal] = []
    for norm in batch_norms(graph):
        reason = _fold_one(norm)
        if reason is None:
            rewrites.append(Rewrite(path(norm.node)))
        else:
            refused.append(Refusal(path(norm.node), reason))
    graph.eliminate_dead_code()
    _apply(mask_of_clamp, graph)
    _apply(crop_of_pad, graph)
    return Report(tuple(rewrites), tuple(refused))


def _apply(identity: Any, graph: Graph) -> None:
    """Rewrite every match of an identity of one node."""
    for node in graph.nodes:
        found = identity.match(node)
        if found is not None:
            identity.rewrite(found)


def _fold_one(norm: BatchNorm) -> str | None:
    """Fold one batch norm, or say why not."""
    found = batch_norm_of_convolution.match(norm)
    if isinstance(found, NoMatch):
        return found.reason
    objection = cost.objection(found)
    if objection is None:
        batch_norm_of_convolution.rewrite(found)
    return objection


def decompose_batch_norms(graph: Graph) -> None:
    """Replace the batch norms that are left, forward and backward, by what Inductor's own table makes of them."""
    table = _torch.default_decompositions()
    for node in graph.nodes:
        if node.target in _torch.batch_norm_ops():
            _decompose(node, table[node.target])
    graph.eliminate_dead_code()


def path(node: Node) -> str:
    """The module path of a node, such as layer1.0.bn2; its source line if it has no module of its own."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    names = [re.sub(r"^\w\['[^']*'\]\.?", "", name) for name, _ in stack.values()]
    if names and names[-1]:
        return names[-1]
    lines = re.findall(r'File "([^"]*)", line (\d+)', node.meta.get("stack_trace") or "")
    return "batch_norm at {}:{}".format(*lines[-1]) if lines else node.name


def save_reads_of_mutated_inputs(graph: Graph) -> None:
    """Keep the partitioner from reading, in backward, an input that forward has written to since.

    Recomputing such a read gives gradients of the wrong values (torch <= 2.13: pytorch#197039); weights and statistics
    that are changed in forward would be read so by the fold.
    """
    readers = [user for node in _torch.mutated_inputs(graph) for user in node.users]
    while readers:
        reader = readers.pop()
        if _torch.is_view(reader):
            readers += reader.users
        elif reader.op == "call_function":
            reader.meta.setdefault("recompute", CheckpointPolicy.MUST_SAVE)


def _decompose(node: Node, rule: Callable[..., Any]) -> None:
    """Replace one multi-output node by what `rule` computes."""
    nodes = [argument for argument in node.args if isinstance(argument, Node)]

    def of_tensors(*tensors: Any) -> Any:
        rest = iter(tensors)
        return rule(*(next(rest) if isinstance(argument, Node) else argument for argument in node.args), **node.kwargs)

    outputs = splice(of_tensors, *nodes, before=node)
    for getitem in list(node.users):
        output = outputs[getitem.args[1]]  # type: ignore[index]
        if output is not None:
            getitem.replace_all_uses_with(output)


def _refuse_all(graph: Graph, reason: str) -> Report:
    whole = [node for node in graph.nodes if node.target in _torch.batch_norm_ops()]
    return Report(refused=tuple(Refusal(path(node), reason) for node in whole if "backward" not in str(node.target)))


def _warn_of(error: Exception) -> None:
    warnings.warn(
        f"convbn_tune left a graph as it was, because its own pass failed: {type(error).__name__}: {error}. "
        "Training goes on, without folding. Please report this with the model that shows it.",
        stacklevel=2,
    )

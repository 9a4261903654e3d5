"""The pass over one joint (or inference) graph: fold what can be folded, decompose the rest, report. No algebra."""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from convbn_compile import _torch, cost
from convbn_compile._aten import BatchNorm, Gradients, LinearOperator, linear_operators, output
from convbn_compile._region import Region, follow, operator_name
from convbn_compile._splice import cancel_aliases, copy_graph, splice
from convbn_compile.identities import affine_of_linear, crop_of_pad, mask_of_clamp
from convbn_compile.options import Fold
from convbn_compile.report import Kind, NoMatch, Refusal, Report, Rewrite

FAILED = "the pass failed"
"""How the reason starts that every norm has if the pass raised."""


@dataclass(frozen=True)
class Norm:
    """A batch norm of the graph, decomposed: what it was, and the nodes that are its input and its output now."""

    path: str
    training: bool
    has_statistics: bool
    input: Node
    output: Node | None


@dataclass(frozen=True)
class Outcome:
    """What became of a region: folded, or left alone for a reason."""

    region: Region
    reason: str | None


def run(graph: Graph, *, fold: Fold | None = Fold.AUTO) -> Report:
    """Rewrite the graph of a GraphModule; afterwards it holds no whole batch norm any more.

    The rewriting is done on a copy: if any of it fails, the graph stays as it was and a warning says so.

    Args:
        graph: a joint or inference graph with whole batch norms; its module gets the rewritten one.
        fold: what to fold; None only decomposes, which makes the graph that plain Inductor would have.

    Raises:
        Exception: batch norm cannot be decomposed either, so that the graph is of no use.
    """
    module = graph.owning_module
    assert module is not None, "the joint pass needs a graph that a module owns"
    try:
        rewritten = copy_graph(graph)
        rewritten.eliminate_dead_code()
        norms = decompose_batch_norms(rewritten)
        report = Report() if fold is None else _rewrite(rewritten, norms, fold)
        rewritten.lint()
    except Exception as error:  # noqa: BLE001  a user's training never dies of our optimisation
        _warn_of(error)
        norms = decompose_batch_norms(graph)
        module.recompile()
        reason = f"{FAILED}: {type(error).__name__}: {error}"
        return Report(refused=tuple(Refusal(norm.path, reason) for norm in norms))
    module.graph = rewritten
    return report


def decompose_batch_norms(graph: Graph) -> list[Norm]:
    """Replace batch norms, forward and backward, by what Inductor's own table makes of them."""
    table = _torch.default_decompositions()
    norms: list[Norm] = []
    for node in graph.nodes:
        if node.target in _torch.batch_norm_ops():
            norm = BatchNorm.of(node)
            normalised = _decompose(node, table[node.target])
            if norm is not None:
                norms.append(Norm(path(node), norm.training, norm.has_statistics, norm.input, normalised))
    graph.eliminate_dead_code()
    return norms


def _rewrite(graph: Graph, norms: Sequence[Norm], fold: Fold) -> Report:
    """Apply the identities, in order."""
    cancel_aliases(graph)
    graph.eliminate_dead_code()
    written, trains = _torch.mutated_inputs(graph), _torch.is_joint(graph)
    gradients = Gradients(graph)
    outcomes = [_fold(op, fold, gradients, written, trains=trains) for op in linear_operators(graph)]
    _torch.stable_topological_sort(graph)
    graph.eliminate_dead_code()
    _apply(mask_of_clamp, graph)
    _apply(crop_of_pad, graph)
    save_reads_of(written)
    graph.eliminate_dead_code()
    return _report(norms, outcomes)


def _fold(op: LinearOperator, fold: Fold, gradients: Gradients, written: Collection[Node], *, trains: bool) -> Outcome:
    """Fold what is made of a linear operator's output, or say why not."""
    region = follow(op, gradients)
    found = affine_of_linear.match(region, gradients, written)
    if isinstance(found, NoMatch):
        return Outcome(region, found.reason)
    objection = cost.objection(found, trains=trains) if fold is Fold.AUTO else None
    if objection is None:
        affine_of_linear.rewrite(found, in_weight=found.fits and cost.belongs_in_weight(found))
    return Outcome(region, objection)


def _apply(identity: Any, graph: Graph) -> None:
    """Rewrite every match of an identity of one node."""
    for node in graph.nodes:
        found = identity.match(node)
        if found is not None:
            identity.rewrite(found)


def _report(norms: Sequence[Norm], outcomes: Sequence[Outcome]) -> Report:
    """One line for each norm, then one for each affine map with a scale that is written by hand."""
    made_of = {node: outcome for outcome in outcomes for node in outcome.region.affines}
    rewrites: list[Rewrite] = []
    refused: list[Refusal] = []

    def enter(module: str, kind: Kind, reason: str | None) -> None:
        if reason is None:
            rewrites.append(Rewrite(module, kind))
        else:
            refused.append(Refusal(module, reason, kind))

    for norm in norms:
        enter(norm.path, "batch norm", _reason(norm, made_of))
    outputs = {norm.output for norm in norms}
    for outcome in outcomes:
        region = outcome.region
        if region.scale is not None and outputs.isdisjoint(region.affines):
            enter(path(region.scale.node), "affine", outcome.reason)
    return Report(tuple(rewrites), tuple(refused))


def _reason(norm: Norm, made_of: Mapping[Node, Outcome]) -> str | None:
    """Why a norm was not folded; None if it was."""
    if not norm.has_statistics:
        return "it has no running statistics, so that it runs on batch statistics in eval mode, too"
    if norm.training:
        return "it runs on batch statistics (training mode)"
    if norm.output is None:
        return "nothing reads its output"
    if norm.output in made_of:
        outcome = made_of[norm.output]
        on_the_way = any(affine.node is norm.output for affine in outcome.region.way)
        return outcome.reason if on_the_way or outcome.reason else "something else reads its input, too"
    if norm.input in made_of:
        return f"its channels are not the output channels of the {made_of[norm.input].region.op.name} before it"
    return f"its input comes from {_origin(norm.input)}, not from a convolution or linear layer"


def _origin(node: Node) -> str:
    """What computes a node, in words."""
    while node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
    return operator_name(node)


def path(node: Node) -> str:
    """The module path of a node, such as layer1.0.bn2; its source line if it has no module of its own."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    names = [re.sub(r"^\w\['[^']*'\]\.?", "", name) for name, _ in stack.values()]
    if names and names[-1]:
        return names[-1]
    lines = re.findall(r'File "([^"]*)", line (\d+)', node.meta.get("stack_trace") or "")
    return "{}:{}".format(*lines[-1]) if lines else node.name


def save_reads_of(written: Iterable[Node]) -> None:
    """Keep the partitioner from reading, in backward, inputs that forward has written to since.

    Recomputing such a read gives gradients of the wrong values (torch <= 2.13: pytorch#197039); weights and statistics
    that are changed in forward would be read so by the fold.
    """
    readers = [user for node in written for user in node.users]
    while readers:
        reader = readers.pop()
        if _torch.is_view(reader):
            readers += reader.users
        elif reader.op == "call_function":
            reader.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _decompose(node: Node, rule: Callable[..., Any]) -> Node | None:
    """Replace one multi-output node by what `rule` computes; its first output, if that is read."""
    nodes = [argument for argument in node.args if isinstance(argument, Node)]

    def of_tensors(*tensors: Any) -> Any:
        rest = iter(tensors)
        return rule(*(next(rest) if isinstance(argument, Node) else argument for argument in node.args), **node.kwargs)

    outputs = splice(of_tensors, *nodes, before=node)
    first = output(node, 0)
    for getitem in list(node.users):
        new = outputs[getitem.args[1]]  # type: ignore[index]
        if new is not None:
            getitem.replace_all_uses_with(new)
    return None if first is None else outputs[0]


def _warn_of(error: Exception) -> None:
    warnings.warn(
        f"convbn_tune left a graph as it was, because its own pass failed: {type(error).__name__}: {error}. "
        f"Training goes on, without folding. Please report this as an issue of convbn_compile, with the model that "
        f"shows it and the version of torch, {torch.__version__}.",
        stacklevel=2,
    )

"""The pass over one joint (or inference) graph: fold what can be folded, decompose the rest, report. No algebra."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from convbn_compile import _torch, cost
from convbn_compile._aten import BatchNorm, Gradients, LinearOperator, linear_operators, output
from convbn_compile._form import operands
from convbn_compile._match import match
from convbn_compile._outcome import Norm, Outcome, path, report_of
from convbn_compile._per_channel import Affine
from convbn_compile._region import Region, follow, last_region, last_scale, parallel, region, scales, sums
from convbn_compile._rewrite import rewrite
from convbn_compile._splice import cancel_aliases, copy_graph, restride, share_casts, splice
from convbn_compile._trace import Traces
from convbn_compile.identities import bits_of_mask, crop_of_pad, mask_of_clamp, shape_of_input, sign_of_output
from convbn_compile.options import Fold
from convbn_compile.report import NoMatch, Refusal, Report

FAILED = "the pass failed"
"""How the reason starts that every norm has if the pass raised."""


Constants = Callable[[Graph], Collection[Node]]


def no_constants(_: Graph) -> Collection[Node]:
    """Every node is computed in every call."""
    return ()


def run(
    graph: Graph, *, fold: Fold | None = Fold.AUTO, merge_branches: bool = True, constants: Constants = no_constants
) -> Report:
    """Rewrite the graph of a GraphModule; afterwards it holds no whole batch norm any more.

    The rewriting is done on a copy: if any of it fails, the graph stays as it was and a warning says so.

    Args:
        graph: a joint or inference graph with whole batch norms; its module gets the rewritten one.
        fold: what to fold; None only decomposes, which makes the graph that plain Inductor would have.
        merge_branches: merge parallel convolutions of one input.
        constants: the nodes of a graph that are computed once for many calls, so that they cost nothing.

    Raises:
        Exception: batch norm cannot be decomposed either, so that the graph is of no use.
    """
    module = graph.owning_module
    assert module is not None, "the joint pass needs a graph that a module owns"
    report = Report()
    try:
        rewritten = copy_graph(graph)
        rewritten.eliminate_dead_code()
        norms = decompose_batch_norms(rewritten)
        if fold is not None:
            report = _rewrite(rewritten, norms, fold, merge_branches=merge_branches, constants=constants)
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
    traces = Traces()
    for node in graph.nodes:
        if node.target in _torch.batch_norm_ops():
            norm = BatchNorm.of(node)
            normalised = _decompose(node, table[node.target], traces)
            if norm is not None:
                norms.append(Norm(path(node), norm.training, norm.has_statistics, norm.input, normalised))
    graph.eliminate_dead_code()
    return norms


def _rewrite(graph: Graph, norms: Sequence[Norm], fold: Fold, *, merge_branches: bool, constants: Constants) -> Report:
    """Apply the identities, in order."""
    cancel_aliases(graph)
    share_casts(graph)
    graph.eliminate_dead_code()
    written, trains = _torch.mutated_inputs(graph), _torch.is_joint(graph)
    gradients = Gradients(graph)
    on_batch_statistics = {norm.output for norm in norms if norm.training or not norm.has_statistics}
    folding = Folding(fold, merge_branches, gradients, written, on_batch_statistics, trains, constants(graph))
    outcomes = list(folding.all(graph))
    _torch.stable_topological_sort(graph)
    graph.eliminate_dead_code()
    restride(graph)
    _apply(shape_of_input, graph)
    _apply(mask_of_clamp, graph)
    _apply(sign_of_output, graph)
    _apply(crop_of_pad, graph)
    _apply(bits_of_mask, graph)
    restride(graph)
    save_reads_of(written)
    graph.eliminate_dead_code()
    return report_of(norms, outcomes)


@dataclass(frozen=True)
class Folding:
    """What decides on every region of one graph."""

    fold: Fold
    merges: bool
    gradients: Gradients
    written: Collection[Node]
    on_batch_statistics: Collection[Node | None]
    trains: bool
    kept: Collection[Node]

    def all(self, graph: Graph) -> Iterator[Outcome]:
        """Merge branches where that can be done, and fold what is left, operator by operator."""
        free = set(graph.nodes)
        told: set[Node] = set()
        for op in linear_operators(graph):
            for outcome in self._merge(op, free) if self.merges and op.node in free else ():
                if outcome.reason is None or outcome.additions[0] not in told:
                    free.difference_update(outcome.inside)
                    told.update(outcome.additions)
                    yield outcome
            if op.node in free:
                outcome = self._fold(op)
                if outcome.reason is None:
                    free.discard(op.node)
                yield outcome

    def _fold(self, op: LinearOperator) -> Outcome:
        """Fold what is made of one operator's output, or say why not."""
        span = follow([op.node], self.gradients)
        found = last_region(span, op)
        if found is None:
            return Outcome(op.name, "nothing reads its output", span.affines)
        if last_scale(found.output.ancestors()) is None:
            beside = next((affine.node for affine in span.affines.values() if scales(affine)), None)
            also = f"the {op.name}'s output is also read by {', '.join(span.readers)}"
            return Outcome(op.name, also, span.affines, maps={} if beside is None else {beside: span.affines})
        reason = self._rewrite(found, partial(cost.objection, trains=self.trains))
        return Outcome.of_fold(found, reason)

    def _merge(self, op: LinearOperator, free: Collection[Node]) -> Iterator[Outcome]:
        """Merge the largest sum that can be merged, of branches of the operator's input.

        Of those left alone the largest is told, if it has operators that the one that was merged has not.

        Args:
            op: an operator.
            free: the nodes that are as they were: a branch that is folded by itself is merged no more.
        """
        siblings = [other for other in parallel(op) if other.node in free]
        span = follow([op.input, *(sibling.node for sibling in siblings)], self.gradients)
        largest: tuple[Affine, str] | None = None
        merged: Affine | None = None
        for end in sums(span, op):
            found = region(span, siblings, end)
            reason = found.reason if isinstance(found, NoMatch) else self._rewrite(found, cost.merge_objection)
            if reason is None:
                merged = end
                break
            largest = largest or (end, reason)
        if largest is not None and (merged is None or largest[0].starts - {op.input} > merged.starts - {op.input}):
            yield Outcome.of_sum_left_alone(op, *largest)
        if merged is not None:
            yield Outcome.of_merge(op, merged, span)

    def _rewrite(self, region: Region, objection: Callable[..., str | None]) -> str | None:
        """Rewrite a region; or why not."""
        if any(affine.node in self.on_batch_statistics for affine in region.output.ancestors()):
            return "a norm in it runs on batch statistics (training mode)"
        found = match(region, self.gradients, self.written)
        if isinstance(found, NoMatch):
            return found.reason
        reason = objection(found, once=self._is_done_once(region)) if self.fold is Fold.AUTO else None
        if reason is None:
            rewrite(found, in_weight=len(region.branches) > 1 or (found.fits and cost.belongs_in_weight(found)))
        return reason

    def _is_done_once(self, region: Region) -> bool:
        """True if all that goes into the folded weight is kept."""
        read = [op.weight for op in region.operators]
        read += operands(*(affine.steps for affine in region.output.ancestors()))
        return bool(self.kept) and all(node in self.kept for node in read)


def _apply(identity: Any, graph: Graph) -> None:
    """Rewrite every match of an identity of one node."""
    for node in graph.nodes:
        found = identity.match(node)
        if found is not None:
            identity.rewrite(found)


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


@dataclass(frozen=True)
class _Decomposition:
    """A rule of Inductor's table as a function of tensors alone; nodes whose tensors are its arguments are _TENSOR."""

    rule: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, *tensors: Any) -> Any:
        rest = iter(tensors)
        return self.rule(*(next(rest) if item is _TENSOR else item for item in self.args), **self.kwargs)


_TENSOR = object()


def _decompose(node: Node, rule: Callable[..., Any], traces: Traces) -> Node | None:
    """Replace one multi-output node by what `rule` computes; its first output, if that is read."""
    nodes = [argument for argument in node.args if isinstance(argument, Node)]
    args = tuple(_TENSOR if isinstance(argument, Node) else argument for argument in node.args)
    outputs = splice(_Decomposition(rule, args, node.kwargs), *nodes, before=node, traces=traces)
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

"""What became of every norm, affine map and sum of branches of a graph, in the words of the report."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch.fx import Node

from convbn_compile._aten import LinearOperator
from convbn_compile._per_channel import Affine
from convbn_compile._region import Region, Span, adds_up, last_scale, operator_name
from convbn_compile.report import Kind, Refusal, Report, Rewrite


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
    """What became of a region: rewritten, or left alone for a reason.

    Attributes:
        name: what users call its operator.
        affines: the nodes that are affine maps of its outputs.
        inside: those of them that lead to its output.
        maps: the last node of each map that scales by a tensor, and all nodes of that map.
        additions: what adds branches up, the last first.
        merged: how many operators are there no more.
    """

    name: str
    reason: str | None
    affines: Collection[Node] = ()
    inside: Collection[Node] = ()
    maps: Mapping[Node, Collection[Node]] = field(default_factory=dict)
    additions: Sequence[Node] = ()
    merged: int = 0

    @classmethod
    def of_fold(cls, found: Region, reason: str | None) -> Outcome:
        """The outcome of a region of one branch."""
        inside = [affine.node for affine in found.output.ancestors()]
        scale, affines = last_scale(found.output.ancestors()), found.span.affines
        return cls(found.first.name, reason, affines, inside, {} if scale is None else {scale: affines})

    @classmethod
    def of_merge(cls, op: LinearOperator, output: Affine, span: Span) -> Outcome:
        """The outcome of branches that were merged: a map for each, and for their sum."""
        parts: dict[frozenset[Node], list[Affine]] = {}
        for affine in output.ancestors():
            parts.setdefault(affine.starts, []).append(affine)
        lasts = {last_scale(part): [affine.node for affine in part] for part in parts.values()}
        maps = {scale: nodes for scale, nodes in lasts.items() if scale is not None}
        inside = [affine.node for affine in output.ancestors() if affine.node is not op.input]
        past = [node for node, affine in span.affines.items() if affine.starts == output.starts]
        merged = len(output.starts - {op.input}) - 1
        return cls(op.name, None, [*inside, *past], inside, maps, _additions(output), merged)

    @classmethod
    def of_sum_left_alone(cls, op: LinearOperator, output: Affine, reason: str) -> Outcome:
        """The outcome of branches that were not merged, for what is made of the input itself."""
        itself = [affine.node for affine in output.ancestors() if affine.parents and affine.starts == {op.input}]
        return cls(op.name, reason, itself, additions=_additions(output))


def _additions(output: Affine) -> list[Node]:
    return sorted((affine.node for affine in output.ancestors() if adds_up(affine)), reverse=True)


def report_of(norms: Sequence[Norm], outcomes: Sequence[Outcome]) -> Report:
    """One line for each norm, then one for each affine map that is written by hand, and each sum of branches."""
    best_last = sorted(outcomes, key=lambda outcome: outcome.reason is None)
    made_of = {node: outcome for outcome in best_last for node in outcome.affines}
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
        for scale, nodes in outcome.maps.items():
            if outputs.isdisjoint(nodes):
                enter(path(scale), "affine", outcome.reason)
        for addition in outcome.additions[:1]:
            enter(path(addition), "branches", outcome.reason)
    return Report(tuple(rewrites), tuple(refused), sum(outcome.merged for outcome in outcomes))


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
        return (
            outcome.reason if norm.output in outcome.inside or outcome.reason else "something else reads its input, too"
        )
    if norm.input in made_of:
        return f"its channels are not the output channels of the {made_of[norm.input].name} before it"
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

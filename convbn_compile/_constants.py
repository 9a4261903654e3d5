"""An inference graph in two: what is made of parameters and buffers alone, and the rest."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from convbn_compile import _torch
from convbn_compile._aten import aten, value


@dataclass(frozen=True)
class Split:
    """An inference graph in two: what is made of its static inputs alone, and the rest.

    Attributes:
        constants: from the sources to what is kept.
        rest: from what is kept and the other inputs to the outputs.
        kept: fake tensors like those that are kept.
        sources: which inputs `constants` reads.
        others: which inputs `rest` reads.
    """

    constants: GraphModule
    rest: GraphModule
    kept: tuple[Tensor, ...]
    sources: tuple[int, ...]
    others: tuple[int, ...]


def constant_nodes(graph: Graph, static: Collection[int]) -> set[Node]:
    """The nodes that have one value as long as no static input changes, the static inputs themselves included.

    Of equal ones, as a convolution that is called several times has them, all but the first lose their readers, unless
    the caller gets them.

    Args:
        graph: an inference graph.
        static: which of its inputs are the same tensors in every call.
    """
    inputs = graph.find_nodes(op="placeholder")
    written = set(_torch.mutated_inputs(graph))
    constants = {inputs[index] for index in static if index < len(inputs)} - written
    first: dict[Any, Node] = {}
    for node in graph.nodes:
        if _is_function(node) and constants.issuperset(node.all_input_nodes):
            constants.add(node)
            equal = first.setdefault((node.target, str(node.args), str(node.kwargs)), node)
            if equal is not node and not _is_returned(equal) and not _is_returned(node):
                node.replace_all_uses_with(equal)
    return constants


def _is_function(node: Node) -> bool:
    """True if the node's output is tensors, and is determined by its input."""
    tensors = node.meta.get("val")
    if not all(isinstance(tensor, Tensor) for tensor in (tensors if isinstance(tensors, (tuple, list)) else [tensors])):
        return False
    return node.op == "get_attr" or node.target is getitem or _torch.is_function(node)


def split(module: GraphModule, static: Collection[int]) -> Split | None:
    """Split an inference graph; None if there is nothing to keep.

    Args:
        module: an inference graph, in functional form.
        static: which of its inputs are the same tensors in every call.
    """
    graph = module.graph
    inputs, constants = graph.find_nodes(op="placeholder"), constant_nodes(graph, static)
    kept, rest = worth_keeping(graph, constants, constants.intersection(inputs))
    if not kept:
        return None
    making = ancestors(kept)
    sources = [index for index, node in enumerate(inputs) if node in making]
    others = [index for index, node in enumerate(inputs) if node in rest]
    return Split(
        constants=_part(module, [inputs[index] for index in sources], making, kept),
        rest=_part(module, [*kept, *(inputs[index] for index in others)], rest),
        kept=tuple(node.meta["val"] for node in kept),
        sources=tuple(sources),
        others=tuple(others),
    )


def worth_keeping(graph: Graph, constants: Collection[Node], sources: Collection[Node]) -> tuple[list[Node], set[Node]]:
    """The constants to compute once, in order, and the rest, which reads them.

    Views are left to the rest, and so is what the caller gets, who may write to it, and what no source is part of, such
    as arange.

    Args:
        graph: an inference graph.
        constants: its nodes that have one value.
        sources: those that are given.
    """
    of_sources = set(sources)
    for node in graph.nodes:
        if node in constants and not of_sources.isdisjoint(node.all_input_nodes):
            of_sources.add(node)
    kept: list[Node] = []
    rest: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in constants and rest.isdisjoint(node.users):
            continue
        if node in constants and node not in sources and node in of_sources and _can_be_kept(node):
            kept.append(node)
        else:
            rest.add(node)
    return kept[::-1], rest


def keep_in_channels_last(parts: Split) -> Split:
    """The weights of two-dimensional convolutions as Inductor's convolutions want them: not copied in every call.

    Outputs stay as they were traced. Not done where something reads memory as it lies.
    """
    graph = parts.rest.graph
    if not all(map(_takes_any_strides, graph.nodes)):
        return parts
    inputs = graph.find_nodes(op="placeholder")[: len(parts.kept)]
    for node in inputs:
        weighs = [user.target is aten.convolution.default and user.args[1] is node for user in node.users]
        if value(node).ndim == 4 and all(weighs):
            node.meta["val"] = _torch.evaluate(partial(torch.clone, memory_format=torch.channels_last), value(node))
    _torch.keep_output_strides(graph)
    return replace(parts, kept=tuple(map(value, inputs)))


def _takes_any_strides(node: Node) -> bool:
    """True if what the node computes is the same however its input lies in memory."""
    return node.op != "call_function" or node.target is getitem or _torch.takes_any_strides(node)


def _can_be_kept(node: Node) -> bool:
    """True for one tensor with memory of its own, that no output of the graph is a view of."""
    return (
        isinstance(node.meta["val"], Tensor)
        and node.op == "call_function"
        and not _torch.is_view(node)
        and not _is_returned(node)
    )


def _is_returned(node: Node) -> bool:
    return any(user.op == "output" or (_torch.is_view(user) and _is_returned(user)) for user in node.users)


def ancestors(nodes: Sequence[Node]) -> set[Node]:
    """The nodes, and all that they are made of."""
    found, queue = set(nodes), list(nodes)
    while queue:
        new = set(queue.pop().all_input_nodes) - found
        found |= new
        queue += new
    return found


def _part(
    module: GraphModule, inputs: Sequence[Node], nodes: Collection[Node], outputs: Sequence[Node] | None = None
) -> GraphModule:
    """The part of a graph that makes `outputs`, or the graph's own, of `inputs`."""
    part = Graph(tracer_cls=module.graph._tracer_cls)
    placed: dict[Node, Node] = {}
    for node in inputs:
        placed[node] = part.placeholder(node.name)
        placed[node].meta = dict(node.meta)
    for node in module.graph.nodes:
        if node in nodes and node not in placed and (node.op != "output" or outputs is None):
            placed[node] = part.node_copy(node, placed.__getitem__)
    if outputs is not None:
        part.output([placed[node] for node in outputs])
    return GraphModule(module, part)

"""How many bytes are live while a forward and a backward graph run, from their fake tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch.fx import Graph

from convbn_compile import _torch
from convbn_compile.saved_bytes import returned, storages


def live_bytes(lowered: _torch.Lowered) -> list[int]:
    """The sum of memory in use, that of the inputs not counted, at each node of forward and then of backward.

    Outputs and their gradients live until backward is over, and so do the gradients that it makes; what is saved lives
    until its last use in backward.
    """
    forward, backward = lowered.forward, lowered.backward
    given = dict.fromkeys(storages(lowered.inputs), 0)
    sums, live = _walk(forward, given, storages(forward.find_nodes(op="placeholder")))
    if backward is None:
        return sums
    outputs = storages(returned(forward)[: lowered.num_outputs])
    tangents = storages(backward.find_nodes(op="placeholder")).keys() - live.keys()
    return sums + _walk(backward, live, given.keys() | outputs.keys() | tangents)[0]


def gradient_bytes(lowered: _torch.Lowered) -> int:
    """Bytes of what backward returns."""
    return 0 if lowered.backward is None else sum(storages(returned(lowered.backward)).values())


def _walk(graph: Graph, live: Mapping[int, int], held: Collection[int]) -> tuple[list[int], dict[int, int]]:
    """The sum of live bytes at each node of a graph, and the memory that lives afterwards.

    Args:
        graph: in which memory is allocated where a node first has it, and freed after the last node that reads it.
        live: what lives before, with its bytes.
        held: what is not freed.
    """
    live, sums = dict(live), []
    last = {memory: node for node in graph.nodes for memory in storages([node, *node.all_input_nodes])}
    for node in graph.nodes:
        live = storages([node]) | live
        sums.append(sum(live.values()))
        for memory in storages([node, *node.all_input_nodes]) if node.op != "output" else ():
            if last[memory] is node and memory not in held:
                del live[memory]
    return sums, live

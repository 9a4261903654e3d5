"""How many bytes are live while a forward and a backward graph run, from their fake tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch.fx import Graph

from convbn_compile import _torch
from convbn_compile.saved_bytes import returned, storages


def peak_bytes(lowered: _torch.Lowered) -> int:
    """The largest sum of memory in use at one time, that of the inputs not counted.

    Outputs live until backward is over, and so do gradients; what is saved lives until its last use in backward.
    """
    forward, backward = lowered.forward, lowered.backward
    given = dict.fromkeys(storages(lowered.inputs), 0)
    peak, live = _walk(forward, given, storages(forward.find_nodes(op="placeholder")))
    if backward is None:
        return peak
    held = given.keys() | storages(returned(forward)[: lowered.num_outputs]).keys()
    return max(peak, _walk(backward, live, held)[0])


def gradient_bytes(lowered: _torch.Lowered) -> int:
    """Bytes of what backward returns."""
    return 0 if lowered.backward is None else sum(storages(returned(lowered.backward)).values())


def _walk(graph: Graph, live: Mapping[int, int], held: Collection[int]) -> tuple[int, dict[int, int]]:
    """The largest sum of live bytes while a graph runs, and the memory that lives afterwards.

    Args:
        graph: in which memory is allocated where a node first has it, and freed after the last node that reads it.
        live: what lives before, with its bytes.
        held: what is not freed.
    """
    live, peak = dict(live), 0
    last = {memory: node for node in graph.nodes for memory in storages([node, *node.all_input_nodes])}
    for node in graph.nodes:
        live = storages([node]) | live
        peak = max(peak, sum(live.values()))
        for memory in storages([node, *node.all_input_nodes]) if node.op != "output" else ():
            if last[memory] is node and memory not in held:
                del live[memory]
    return peak, live

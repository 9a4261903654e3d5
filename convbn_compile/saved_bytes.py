"""How many bytes a joint graph saves for backward, without running it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.fx import Graph, GraphModule, Node

from convbn_compile import _torch
from convbn_compile._splice import copy_graph
from convbn_compile.joint_pass import decompose_batch_norms


def saved_bytes(joint: Graph) -> int:
    """Bytes of the tensors that the partitioned graph saves; views count once, parameters, buffers and inputs not."""
    copied = _copied(joint)
    outputs = _torch.num_forward_outputs(joint)
    forward, _ = _torch.partition(copied, (), num_fwd_outputs=outputs)
    return kept_bytes(forward.graph, outputs)


def saved_bytes_at(joint: Graph, budgets: Sequence[float]) -> dict[float, int]:
    """The same for each of several memory budgets, in one run of the partitioner."""
    copied = _copied(joint)
    saved = _torch.saved_values(copied, budgets, num_fwd_outputs=_torch.num_forward_outputs(joint))
    return {budget: _num_bytes(copied.graph, nodes) for budget, nodes in saved.items()}


def _copied(joint: Graph) -> GraphModule:
    """A copy for the partitioner, which changes what it is given."""
    module = joint.owning_module
    assert module is not None, "saved_bytes needs a graph that a module owns"
    copied = GraphModule(module, copy_graph(joint))
    decompose_batch_norms(copied.graph)
    return copied


def kept_bytes(forward: Graph, num_outputs: int) -> int:
    """Bytes that a forward graph hands on after its first `num_outputs` outputs, its inputs not counted."""
    return _num_bytes(forward, returned(forward)[num_outputs:])


def _num_bytes(graph: Graph, nodes: Iterable[Any]) -> int:
    """Bytes of what nodes of a graph are, the graph's inputs not counted."""
    given = storages(graph.find_nodes(op="placeholder"))
    return sum(size for storage, size in storages(nodes).items() if storage not in given)


def returned(graph: Graph) -> list[Any]:
    """The outputs of a graph: nodes, or None."""
    outputs = graph.output_node().args[0]
    assert isinstance(outputs, (list, tuple)), "AOTAutograd's graphs return a tuple"
    return list(outputs)


def storages(nodes: Iterable[Any]) -> dict[int, int]:
    """The memory of the tensors that nodes are, views once: what tells one from another, and its bytes."""
    values = [node.meta.get("val") for node in nodes if isinstance(node, Node)]
    memory = [tensor.untyped_storage() for tensor in _torch.tensors_in(values)]
    return {storage._cdata: _torch.size_hint(storage.nbytes()) for storage in memory}

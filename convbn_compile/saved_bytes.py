"""How many bytes a joint graph saves for backward, without running it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.fx import Graph, GraphModule, Node

from convbn_compile import _torch
from convbn_compile._splice import copy_graph
from convbn_compile.joint_pass import decompose_batch_norms


def saved_bytes(joint: Graph) -> int:
    """Bytes of the tensors that the partitioned graph saves; views count once, parameters, buffers and inputs not."""
    module = joint.owning_module
    assert module is not None, "saved_bytes needs a graph that a module owns"
    copied = GraphModule(module, copy_graph(joint))
    decompose_batch_norms(copied.graph)
    outputs = _torch.num_forward_outputs(joint)
    forward, _ = _torch.partition(copied, (), num_fwd_outputs=outputs)
    return kept_bytes(forward.graph, outputs)


def kept_bytes(forward: Graph, num_outputs: int) -> int:
    """Bytes that a forward graph hands on after its first `num_outputs` outputs, its inputs not counted."""
    given, saved = storages(forward.find_nodes(op="placeholder")), storages(returned(forward)[num_outputs:])
    return sum(size for storage, size in saved.items() if storage not in given)


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

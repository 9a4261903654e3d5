"""How many bytes a joint graph saves for backward, without running it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from convbn_compile import _torch
from convbn_compile._splice import copy_graph
from convbn_compile.joint_pass import decompose_batch_norms


def saved_bytes(joint: Graph) -> int:
    """Bytes of the tensors that the partitioned graph saves; views count once, parameters, buffers and inputs not."""
    copied = _copied(joint)
    outputs = _torch.num_forward_outputs(joint)
    forward, _ = _torch.partition(copied, (), num_fwd_outputs=outputs)
    return _num_bytes_of(_output_nodes(forward.graph)[outputs:], forward.graph)


def saved_bytes_at(joint: Graph, budgets: Sequence[float]) -> dict[float, int]:
    """The same for each of several memory budgets, in one run of the partitioner."""
    copied = _copied(joint)
    saved = _torch.saved_values(copied, budgets, num_fwd_outputs=_torch.num_forward_outputs(joint))
    return {budget: _num_bytes_of(nodes, copied.graph) for budget, nodes in saved.items()}


def _copied(joint: Graph) -> GraphModule:
    """A copy for the partitioner, which changes what it is given."""
    module = joint.owning_module
    assert module is not None, "saved_bytes needs a graph that a module owns"
    copied = GraphModule(module, copy_graph(joint))
    decompose_batch_norms(copied.graph)
    return copied


def _num_bytes_of(saved: Iterable[Node], graph: Graph) -> int:
    """Bytes of what is saved, without the inputs of the graph."""
    given = {_storage(node) for node in graph.find_nodes(op="placeholder")}
    return sum(
        _num_bytes(node) for storage, node in {_storage(node): node for node in saved}.items() if storage not in given
    )


def _output_nodes(graph: Graph) -> list[Node]:
    outputs = graph.output_node().args[0]
    assert isinstance(outputs, (list, tuple))
    return [node for node in outputs if isinstance(node, Node)]


def _storage(node: Node) -> int:
    """What tells one storage from another; a number that is saved, such as a dynamic size, has its own."""
    value = node.meta["val"]
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else id(node)


def _num_bytes(node: Node) -> int:
    value = node.meta["val"]
    return _torch.size_hint(value.untyped_storage().nbytes()) if isinstance(value, Tensor) else 0

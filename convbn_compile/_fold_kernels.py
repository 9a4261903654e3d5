"""Fewer kernels for the folds of one graph, forward or backward, as Inductor gets it; nothing that is computed changes.

On a GPU most folds are kernels that take less time than their launch. Folded weights are written by one kernel for many
pairs: _foreach_mul, of which Inductor makes one horizontally fused kernel, as it does of compiled optimizers. b' is
added after the convolution, where it is part of the kernel that follows; Inductor takes biases off convolutions there
anyway, but may write down first what it takes off.

On a CPU, where loops of neighbouring folds share a function already, the weight of convolution_backward is written in
channels_last at once, rather than written and then copied.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from operator import getitem

import torch
from torch import Tensor
from torch.fx import Graph, Node

from convbn_compile import _torch
from convbn_compile._aten import aten, value
from convbn_compile._splice import copy_graph, splice

FOLDED = "convbn_compile: a folded weight"
"""The key, in a node's meta, that says that it is one."""

CHUNK = 4 * 2**20
"""How many bytes of folded weights are written together at most, and so are in memory that else would not be yet."""


def reduce_kernels(graph: Graph) -> None:
    """Rewrite the graph of a GraphModule; if that fails it stays as it is, and a warning says so."""
    module = graph.owning_module
    assert module is not None, "fewer kernels need a graph that a module owns"
    if not any(FOLDED in node.meta for node in graph.nodes):
        return
    try:
        rewritten = copy_graph(graph)
        add_shifts_apart(rewritten)
        write_together(rewritten)
        write_channels_last(rewritten)
        rewritten.lint()
    except Exception as error:  # noqa: BLE001  a user's training never dies of our optimisation
        warnings.warn(f"convbn_tune did not put kernels together: {error!r}. Please report this.", stacklevel=2)
        return
    module.graph = rewritten


def write_together(graph: Graph, *, device: str = "cuda", chunk: int = CHUNK) -> None:
    """Write folded weights of one device in chunks, each where the first of its weights is read.

    Args:
        graph: forward or backward.
        device: the type of device whose weights are put together; Inductor fuses foreach on CUDA, not on CPUs.
        chunk: how many bytes a chunk has at most; a weight that has more is alone.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for weights in _chunks(graph, order, device, chunk):
        first = min((user for weight in weights for user in weight.users), key=order.__getitem__)
        late = {node for weight in weights for node in _made_of(weight) if order[node] > order[first]}
        for node in sorted(late - set(graph.find_nodes(op="placeholder")), key=order.__getitem__):
            first.prepend(node)
        _write_at_once(weights, before=first)


def _chunks(graph: Graph, order: dict[Node, int], device: str, chunk: int) -> Iterator[list[Node]]:
    """Weights in the order in which they are read, two or more of one dtype."""
    written = set(_torch.mutated_inputs(graph))
    found = [node for node in graph.nodes if FOLDED in node.meta and _can_move(node, written, device)]
    weights: list[Node] = []
    for weight in sorted(found, key=lambda node: min(order[user] for user in node.users)):
        together = [*weights, weight]
        if sum(map(_num_bytes, together)) > chunk or value(weight).dtype != value(together[0]).dtype:
            together = [weight]
            if len(weights) > 1:
                yield weights
        weights = together
    if len(weights) > 1:
        yield weights


def _can_move(weight: Node, written: set[Node], device: str) -> bool:
    """True if it is made of inputs alone, by functions, and of fixed sizes."""
    fixed = all(isinstance(size, int) for size in value(weight).shape)
    if not fixed or value(weight).device.type != device or not weight.users:
        return False
    return all(
        node not in written if node.op == "placeholder" else node.op == "call_function" and _torch.is_function(node)
        for node in _made_of(weight)
    )


def _made_of(weight: Node) -> set[Node]:
    """The node, what it reads, what that reads, and so on."""
    found, rest = {weight}, [weight]
    while rest:
        new = set(rest.pop().all_input_nodes) - found
        found |= new
        rest += new
    return found


def _write_at_once(weights: list[Node], *, before: Node) -> None:
    """Read the weights out of one node; times 1 because a foreach operator that copies is not in torch 2.11."""
    graph = before.graph
    with graph.inserting_before(before):
        together = graph.call_function(aten._foreach_mul.Scalar, (weights, 1))
        together.meta["val"] = [value(weight) for weight in weights]
        for index, weight in enumerate(weights):
            new = graph.call_function(getitem, (together, index))
            new.meta = dict(weight.meta)
            weight.replace_all_uses_with(new, delete_user_cb=lambda user: user is not together)


def _num_bytes(weight: Node) -> int:
    return value(weight).numel() * value(weight).element_size()


def add_shifts_apart(graph: Graph, *, device: str = "cuda") -> None:
    """Add what is computed to be a convolution's bias after it."""
    for node in graph.find_nodes(op="call_function", target=aten.convolution.default):
        bias = node.args[2]
        if bias is None or bias.op != "call_function" or FOLDED not in node.args[1].meta:
            continue
        if value(node).device.type == device:
            node.update_arg(2, None)
            (sum_,) = splice(_plus_per_channel, node, bias, before=node.next, like=node)
            assert sum_ is not None
            node.replace_all_uses_with(sum_, delete_user_cb=lambda user, own=sum_: user is not own)


def _plus_per_channel(output: Tensor, bias: Tensor) -> Tensor:
    return output + bias.reshape(-1, *(1,) * (output.dim() - 2))


def write_channels_last(graph: Graph) -> None:
    """Have the weights that convolution_backward reads in channels_last, as Inductor has them on CPUs with oneDNN."""
    if not torch.backends.mkldnn.enabled or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    for node in graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
        weight = node.args[2]
        if FOLDED in weight.meta and _is_copied(value(weight)):
            (new,) = splice(_in_channels_last, weight, before=node, like=weight)
            assert new is not None
            node.update_arg(2, new)


def _is_copied(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dim() == 4 and weight.shape[1] > 1


def _in_channels_last(weight: Tensor) -> Tensor:
    return weight.clone(memory_format=torch.channels_last)

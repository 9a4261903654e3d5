"""Trace a tensor function on fake tensors: the aten graph of what it does, decomposed as Inductor would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate, map_arg

from convbn_compile import _torch
from convbn_compile._aten import aten

Fakes = Sequence[Any]
"""Fake tensors of one fake mode, or dynamic numbers; None for what a function is called without."""


@dataclass(frozen=True)
class Trace:
    """What a function does, with a placeholder for each argument, and what stands for each node in this call."""

    graph: Graph
    fakes: dict[Node, Any]


class Traces:
    """The traces of one pass: what was traced for tensors of the same sizes, strides, ... is not traced again.

    Functions are told apart by ==, so that those that are traced often had best be values, such as frozen dataclasses.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Graph] = {}

    def of(self, function: Callable[..., Any], fakes: Fakes) -> Trace:
        """The trace, whose fake tensors are nobody else's."""
        if not all(map(_has_numbers, fakes)):
            return trace(function, fakes)
        key = (function, *map(_facts, fakes), *(_place(fake, fakes) for fake in fakes))
        if key in self._known:
            return _again(self._known[key], fakes)
        traced = trace(function, fakes)
        self._known[key] = traced.graph
        return traced


def _has_numbers(fake: Any) -> bool:
    """True if no size, stride or offset is dynamic."""
    if not isinstance(fake, Tensor):
        return fake is None
    return all(isinstance(number, int) for number in (*fake.shape, *fake.stride(), fake.storage_offset()))


def _facts(fake: Tensor | None) -> Any:
    """What decomposing may depend on."""
    return None if fake is None else (fake.shape, fake.stride(), fake.storage_offset(), fake.dtype, fake.device)


def _place(fake: Tensor | None, fakes: Fakes) -> int:
    """Where the same tensor is first."""
    return next(place for place, other in enumerate(fakes) if other is fake)


def _again(graph: Graph, fakes: Fakes) -> Trace:
    """A trace for other tensors of which the same is true."""
    made: dict[Node, Any] = dict(zip(graph.find_nodes(op="placeholder"), fakes, strict=True))
    with _torch.on_fakes(fakes):
        for node in graph.nodes:
            if node.op == "call_function":
                args, kwargs = map_arg((node.args, node.kwargs), made.__getitem__)
                made[node] = node.target(*args, **kwargs)
    return Trace(graph, made)


def trace(function: Callable[..., Any], fakes: Fakes) -> Trace:
    """Trace a function of tensors or None, that returns a tensor, None, or a tuple of them."""
    try:
        graph = _recorded(function, fakes)
    except Exception:  # noqa: BLE001  an error of the function's own comes again
        graph = _torch.traced_by_make_fx(function, fakes)
    return Trace(graph, {node: node.meta.get("val") for node in graph.nodes})


class _NotRecorded(Exception):  # noqa: N818  it is no error
    """What a function does is more than a recorder knows of."""


def _recorded(function: Callable[..., Any], fakes: Fakes) -> Graph:
    """The graph, as make_fx has it, in a third of the time."""
    recorder = _Recorder(fakes)
    with _torch.on_fakes(fakes), recorder:
        result = function(*fakes)
    recorder.graph.output(recorder.nodes_of(tuple(result) if isinstance(result, list) else result))
    for node in reversed(recorder.graph.nodes):
        if node.op == "call_function" and not node.users:
            recorder.graph.erase_node(node)
    return recorder.graph


class _Recorder(_torch.DispatchMode):  # type: ignore[no-untyped-call]
    """Writes down what operators are called inside, decomposed; neither arithmetic of sizes, nor what writes."""

    def __init__(self, fakes: Fakes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = Graph()
        self._table = _torch.default_decompositions()
        self._known: dict[int, tuple[Tensor, Node]] = {}  # by id, which stays the tensor's as long as that is kept
        for index, fake in enumerate(fakes):
            self._enter(self.graph.placeholder(f"argument_{index}"), fake)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks for a device
            return func(*args, **kwargs)
        if func is aten.detach.default:  # what makes a tensor of numbers calls it
            return self._stands_for(func(*args), self.nodes_of(args[0]))
        for decomposed in filter(None, (self._table.get(func), _torch.composite(func, args))):
            with self:
                result = decomposed(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func._schema.is_mutable:
            raise _NotRecorded
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        node = self.graph.create_node("call_function", func, self.nodes_of(args), self.nodes_of(kwargs), name)
        self._enter(node, result)
        return result

    def _enter(self, node: Node, result: Any) -> None:
        """Note what a node stands for."""
        node.meta["val"] = result
        if isinstance(result, Tensor):
            self._stands_for(result, node)
        elif isinstance(result, (tuple, list)):
            for index, item in enumerate(result):
                self._enter(self.graph.call_function(getitem, (node, index)), item)
        elif result is not None:
            raise _NotRecorded

    def _stands_for(self, tensor: Tensor, node: Node) -> Tensor:
        self._known[id(tensor)] = (tensor, node)
        return tensor

    def nodes_of(self, values: Any) -> Any:
        """Arguments or results with nodes in place of tensors."""
        return map_aggregate(values, self._node_of)

    def _node_of(self, value: Any) -> Any:
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise _NotRecorded
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._known:
            raise _NotRecorded
        return self._known[id(value)][1]

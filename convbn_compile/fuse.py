"""fuse: a module with norms folded into its convolutions and branches merged, to keep, export and ship."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from convbn_compile import _torch, joint_pass
from convbn_compile._aten import LinearOperator, LinearParams, MatmulParams, linear_operators
from convbn_compile._constants import ancestors, constant_nodes, worth_keeping
from convbn_compile._wrapped import check_module, unwrapped
from convbn_compile.report import Report


class Fused(GraphModule):
    """A module of plain layers, without batch norm where that could be folded; for inference.

    Attributes:
        report: what was folded and merged, and what not and why.
    """

    report: Report


def fuse(
    model: nn.Module,
    *example_inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Fused:
    """A copy of a model with norms folded into its convolutions and linear layers, and parallel branches merged.

    It is called as the model is, on the same devices, and exports: torch.export.export, torch.onnx.export,
    torch.jit.trace; its state_dict can be saved. Its layers are nn.Conv1d/2d/3d, nn.ConvTranspose1d/2d/3d and
    nn.Linear under the paths of the model's; what else it computes is written out in its forward. Parameters require no
    grad: to train, keep the model, in Tune mode. Later changes of the model do not reach it; for evaluation in between,
    mode="deploy" follows them.

    Args:
        model: in eval mode.
        example_inputs: what the model is called with; sizes are fixed but for those in `dynamic_shapes`.
        kwargs: the keyword arguments that it is called with.
        dynamic_shapes: the sizes that may differ, as torch.export.export takes them, such as
            ({0: torch.export.Dim.DYNAMIC},) for a first input with any batch size.

    Returns:
        The fused module; its `report` has a line for every norm.

    Raises:
        TypeError: `model` is not a module, or one of TorchScript.
        ValueError: it is in training mode, or a part of it; it writes to a buffer, or torch.export cannot capture it.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> fused = fuse(net, torch.zeros(1, 3, 8, 8))
        >>> fused.report.folded, sorted(fused.state_dict())
        (1, ['0.bias', '0.weight'])
    """
    _check(model)
    with torch.inference_mode(mode=False), torch.no_grad():
        module = _captured(model, example_inputs, dict(kwargs or {}), dynamic_shapes)
        report = joint_pass.run(module.graph, constants=_constants)
        fused = Fused(_attributes_and_layers(module), module.graph, "Fused")
    fused.report = report
    return fused.eval()


def _check(model: nn.Module) -> None:
    check_module(model, "fuse")
    training = [name or "the model itself" for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(
            f"fuse needs a model in eval mode, but {training[0]} is in training mode. Call model.eval() first; "
            "batch norm in training mode cannot be folded."
        )


_PAIRED = {"linear", "t", "transpose", "batch_norm", "_convolution_mode"} | {
    f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3)
}
"""The operators that the joint pass wants decomposed; all others stay as the model calls them."""


def _captured(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> GraphModule:
    """The graph of a model, in functional form, with its parameters and buffers as attributes."""
    model = unwrapped(model)
    rules: Any = torch.export.default_decompositions()
    table = {op: rule for op, rule in rules.items() if op.namespace == "aten" and op._opname in _PAIRED}
    try:
        with _torch.not_compiled_in_place(model):
            program = torch.export.export(model, inputs, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
            program = program.run_decompositions(table)
    except Exception as error:
        raise ValueError(
            f"fuse needs a model that torch.export can capture with these inputs; {type(model).__name__} it cannot: "
            f"{error}"
        ) from error
    written = list(program.graph_signature.buffers_to_mutate.values())
    if written:
        raise ValueError(
            f"fuse needs a model whose forward writes to no buffer, but {type(model).__name__} writes to {written[0]}."
        )
    module = program.module()
    assert isinstance(module, GraphModule)
    return module


def _constants(graph: Graph) -> set[Node]:
    return constant_nodes(graph, static=())


def _attributes_and_layers(module: GraphModule) -> dict[str, Any]:
    """Have a graph call layers where weights are constant, and read its other constants; path to each of both."""
    graph = module.graph
    found = _layers(module)
    kept, _ = worth_keeping(graph, _constants(graph), graph.find_nodes(op="get_attr"))
    values = _computed(module, [*kept, *graph.find_nodes(op="get_attr")])
    for node in kept:
        name = _free(f"constant_{node.name}", found)
        with graph.inserting_before(node):
            read = graph.create_node("get_attr", name)
        found[name] = values[read] = values[node]
        node.replace_all_uses_with(read)
    _erase_dead(graph)
    for node in graph.find_nodes(op="get_attr"):
        if node.target.rpartition(".")[0] in found or node.target.partition(".")[0] == "report":
            node.target = _free(node.target.replace(".", "_"), found)
        found[node.target] = _copy(values[node]) if isinstance(values[node], Tensor) else values[node]
    called = {node.target for node in graph.find_nodes(op="call_module")}
    return found | {name: module.get_submodule(name) for name in called if name not in found}


def _layers(module: GraphModule) -> dict[str, Any]:
    """Have a graph call a layer for every operator whose weight and bias are constants; path to layer."""
    graph, constants = module.graph, _constants(module.graph)
    operators = [op for op in linear_operators(graph) if constants.issuperset(_tensors(op))]
    values = _computed(module, [node for op in operators for node in _tensors(op)])
    layers: dict[str, Any] = {}
    avoid = {name for name, _ in module.named_modules()}
    paths: dict[tuple[Any, ...], str] = {}
    for op in operators:
        key = (*_tensors(op), op.params)
        if key not in paths:
            paths[key] = _free(_layer_path(op), layers, avoid)
            layers[paths[key]] = _layer(op.params, *(values[node] for node in _tensors(op)))
    for op in reversed(operators):  # so that no input is a node that was replaced
        with graph.inserting_before(op.node):
            call = graph.create_node("call_module", paths[(*_tensors(op), op.params)], (op.input,))
        call.meta = dict(op.node.meta)
        op.node.replace_all_uses_with(call)
    _erase_dead(graph)
    return layers


def _tensors(op: LinearOperator) -> list[Node]:
    """Weight and bias, if there is one."""
    return [op.weight] if op.bias is None else [op.weight, op.bias]


def _erase_dead(graph: Graph) -> None:
    for node in reversed(graph.nodes):
        if not node.users and (node.op == "get_attr" or (node.op == "call_function" and not node.is_impure())):
            graph.erase_node(node)


def _computed(module: GraphModule, nodes: Sequence[Node]) -> dict[Node, Any]:
    """The values of constants, and of all that they are made of."""
    values: dict[Node, Any] = {}
    needed = ancestors(nodes)
    for node in module.graph.nodes:
        if node in needed and node.op == "get_attr":
            values[node] = _attribute(module, node.target)
        elif node in needed:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return values


def _attribute(module: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _free(path: str, taken: Collection[str], avoid: Collection[str] = ()) -> str:
    """The path, or the path with a number if there is something already, or it begins with what is Fused's own."""
    head, dot, rest = path.partition(".")
    first = f"{head}_{dot}{rest}" if head == "report" else path
    count, name = 1, first
    while name in taken or (name != path and name in avoid):
        count += 1
        name = f"{first}_{count}"
    return name


def _layer_path(op: LinearOperator) -> str:
    """The path of the first convolution whose weight is in this one's."""
    rank = op.weight.meta["val"].dim()
    weights = [node for node in ancestors([op.weight]) if node.op == "get_attr" and node.meta["val"].dim() == rank]
    first = min(weights, default=None)
    path = op.node.name if first is None else str(first.target).rpartition(".")[0].partition(".parametrizations")[0]
    return path or "layer"


def _layer(params: LinearParams, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """nn.Conv2d, nn.Linear, ... with these values."""
    if isinstance(params, MatmulParams) and params.transposed:
        weight = weight.t()
    with torch.device("meta"):
        layer = _empty_layer(params, weight.shape, has_bias=bias is not None)
    layer.weight = _copy(nn.Parameter(weight))
    if bias is not None:
        layer.bias = _copy(nn.Parameter(bias))
    return layer


def _copy(tensor: Tensor) -> Tensor:
    """A parameter of a parameter, a tensor of a tensor, that nothing else writes to."""
    copied = tensor.detach().clone()
    return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied


def _empty_layer(params: LinearParams, weight: Sequence[int], *, has_bias: bool) -> nn.Module:
    outer, inner, *kernel = weight
    if isinstance(params, MatmulParams):
        return nn.Linear(inner, outer, bias=has_bias)
    common: dict[str, Any] = {"dilation": params.dilation, "groups": params.groups, "bias": has_bias}
    geometry = (tuple(kernel), params.stride, params.padding)
    kinds: Any
    if params.transposed:
        kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        channels, common["output_padding"] = (outer, inner * params.groups), params.output_padding
    else:
        kinds, channels = (nn.Conv1d, nn.Conv2d, nn.Conv3d), (inner * params.groups, outer)
    layer: nn.Module = kinds[len(kernel) - 1](*channels, *geometry, **common)
    return layer

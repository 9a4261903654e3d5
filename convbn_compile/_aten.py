"""Typed views of the aten nodes we read: the only file that knows what their arguments are called."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

aten = torch.ops.aten
convert_element_type = torch.ops.prims.convert_element_type.default


@dataclass(frozen=True)
class ConvParams:
    """What a convolution is besides its tensors, in the words of aten's schema."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """aten.convolution: input [N, C_in, *spatial] to [N, C_out, *spatial_out]."""
        output: Tensor = aten.convolution.default(
            input,
            weight,
            bias,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
        )
        return output

    def backward(
        self, grad_output: Tensor, input: Tensor, weight: Tensor, *, needs_input: bool, needs_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """aten.convolution_backward without its bias gradient: (grad_input, grad_weight), None where not needed."""
        grad_input, grad_weight, _ = aten.convolution_backward.default(
            grad_output,
            input,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
            [needs_input, needs_weight, False],
        )
        return (grad_input if needs_input else None, grad_weight if needs_weight else None)

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> ConvParams:
        """From the bound arguments of aten.convolution or aten.convolution_backward."""
        return cls(
            stride=tuple(arguments["stride"]),
            padding=tuple(arguments["padding"]),
            dilation=tuple(arguments["dilation"]),
            transposed=arguments["transposed"],
            output_padding=tuple(arguments["output_padding"]),
            groups=arguments["groups"],
        )

    @property
    def is_static(self) -> bool:
        """False if a stride, padding, ... is computed in the graph."""
        numbers = (*self.stride, *self.padding, *self.dilation, *self.output_padding, self.groups)
        return all(isinstance(number, int) for number in numbers)


@dataclass(frozen=True)
class Convolution:
    """One aten.convolution node."""

    node: Node
    input: Node
    weight: Node
    bias: Node | None
    params: ConvParams

    @classmethod
    def of(cls, node: Node) -> Convolution | None:
        """The view, or None if `node` is something else."""
        if node.target is not aten.convolution.default:
            return None
        arguments = bind(node)
        return cls(node, arguments["input"], arguments["weight"], arguments["bias"], ConvParams.of(arguments))


@dataclass(frozen=True)
class ConvolutionBackward:
    """One aten.convolution_backward node; the gradients are those that something reads."""

    node: Node
    grad_output: Node
    input: Node
    weight: Node
    params: ConvParams
    grad_input: Node | None
    grad_weight: Node | None
    grad_bias: Node | None

    @classmethod
    def of(cls, node: Node) -> ConvolutionBackward | None:
        """The view, or None if `node` is something else."""
        if node.target is not aten.convolution_backward.default:
            return None
        arguments = bind(node)
        return cls(
            node,
            arguments["grad_output"],
            arguments["input"],
            arguments["weight"],
            ConvParams.of(arguments),
            grad_input=output(node, 0),
            grad_weight=output(node, 1),
            grad_bias=output(node, 2),
        )


@dataclass(frozen=True)
class BatchNorm:
    """One forward batch-norm node of any spelling."""

    node: Node
    input: Node
    weight: Node | None
    bias: Node | None
    running_mean: Node | None
    running_var: Node | None
    training: bool
    eps: float

    @classmethod
    def of(cls, node: Node) -> BatchNorm | None:
        """The view, or None if `node` is something else."""
        training = _FORWARD_BATCH_NORMS.get(node.target, _MISSING)
        if training is _MISSING:
            return None
        arguments = bind(node)
        return cls(
            node,
            arguments["input"],
            arguments["weight"],
            arguments["bias"],
            arguments.get("running_mean"),
            arguments.get("running_var"),
            training=arguments["training"] if training is None else training,
            eps=arguments["eps"] if "eps" in arguments else arguments["epsilon"],
        )

    @property
    def output(self) -> Node | None:
        """The normalised tensor, if something reads it."""
        return output(self.node, 0)


@dataclass(frozen=True)
class BatchNormBackward:
    """One eval-mode aten.native_batch_norm_backward node; the gradients are those that something reads."""

    node: Node
    grad_output: Node
    input: Node
    weight: Node | None
    running_mean: Node | None
    running_var: Node | None
    eps: float
    grad_input: Node | None
    grad_weight: Node | None
    grad_bias: Node | None

    @classmethod
    def of(cls, node: Node) -> BatchNormBackward | None:
        """The view, or None if `node` is something else or runs on batch statistics."""
        if node.target not in _BACKWARD_BATCH_NORMS:
            return None
        arguments = bind(node)
        if arguments.get("train", arguments.get("update")):
            return None
        return cls(
            node,
            arguments["grad_out"],
            arguments["input"],
            arguments["weight"],
            arguments["running_mean"],
            arguments["running_var"],
            arguments["eps"],
            grad_input=output(node, 0),
            grad_weight=output(node, 1),
            grad_bias=output(node, 2),
        )


_MISSING = object()

# Forward batch norms and whether they run on batch statistics; None: their argument `training` says.
_FORWARD_BATCH_NORMS: dict[Any, Any] = {
    aten._native_batch_norm_legit_no_training.default: False,
    aten._batch_norm_no_update.default: False,
    aten._batch_norm_with_update.default: True,
    aten._batch_norm_with_update_functional.default: True,
    aten._native_batch_norm_legit.default: None,
    aten._native_batch_norm_legit.no_stats: None,
    aten._native_batch_norm_legit_functional.default: None,
    aten.native_batch_norm.default: None,
    aten.cudnn_batch_norm.default: None,
    aten.miopen_batch_norm.default: None,
}
_BACKWARD_BATCH_NORMS = frozenset({aten.native_batch_norm_backward.default, aten.batch_norm_backward.default})


def bind(node: Node) -> dict[str, Any]:
    """The arguments of a call to an aten operator, by their names in its schema, defaults filled in."""
    names = node.target._schema.arguments  # type: ignore[union-attr]
    bound: dict[str, Any] = {name.name: name.default_value for name in names if name.has_default_value()}
    bound.update((name.name, value) for name, value in zip(names, node.args, strict=False))
    bound.update(node.kwargs)
    return bound


def output(node: Node, index: int) -> Node | None:
    """The getitem that reads output `index` of a multi-output node, if it is itself read."""
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == index and user.users:
            return user
    return None


def batch_norms(graph: Graph) -> list[BatchNorm]:
    """Every forward batch norm of the graph, in order."""
    return [norm for node in graph.nodes if (norm := BatchNorm.of(node)) is not None]


def value(node: Node) -> Tensor:
    """The fake tensor that stands for the node's output."""
    fake = node.meta["val"]
    assert isinstance(fake, Tensor), f"{node.name} is not a tensor"
    return fake


def before_cast(node: Node) -> Node:
    """The node that a widening-free cast reads: w32 for convert(w32, bf16), as autocast writes it; else itself."""
    if node.target is not convert_element_type:
        return node
    source = bind(node)["a"]
    wider = torch.promote_types(value(source).dtype, value(node).dtype) == value(source).dtype
    return source if wider else node

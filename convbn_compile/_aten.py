"""Typed views of the aten nodes we read: the only file that knows what their arguments are called."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from convbn_compile import _torch

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
        rank = value(arguments["weight"]).dim() - 2

        def of_axes(name: str) -> tuple[int, ...]:
            numbers = tuple(map(_from_outside, arguments[name]))
            return numbers * rank if len(numbers) == 1 else numbers  # aten lets one stand for all axes

        return cls(
            stride=of_axes("stride"),
            padding=of_axes("padding"),
            dilation=of_axes("dilation"),
            transposed=arguments["transposed"],
            output_padding=of_axes("output_padding"),
            groups=_from_outside(arguments["groups"]),
        )

    @property
    def is_static(self) -> bool:
        """False if a stride, padding, ... is computed in the graph."""
        numbers = (*self.stride, *self.padding, *self.dilation, *self.output_padding, self.groups)
        return all(isinstance(number, int) for number in numbers)


def _from_outside(number: Any) -> Any:
    """A stride, padding, ... that is an input of the graph as the number that it is, which Inductor guards on, too.

    It is one if a block that fully_shard was applied to is called with several (torch 2.13).
    """
    return _torch.guarded(number.meta["val"]) if isinstance(number, Node) and number.op == "placeholder" else number


@dataclass(frozen=True)
class MatmulParams:
    """What a matrix product with a weight is besides its tensors: a linear layer, or x @ w if transposed."""

    transposed: bool
    groups: int = 1

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Input [N, C_in] to [N, C_out]."""
        weight = weight if self.transposed else weight.t()
        return torch.mm(input, weight) if bias is None else torch.addmm(bias, input, weight)

    def backward(
        self, grad_output: Tensor, input: Tensor, weight: Tensor, *, needs_input: bool, needs_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """(grad_input, grad_weight), None where not needed."""
        grad_input = grad_weight = None
        if needs_input:
            grad_input = torch.mm(grad_output, weight.t() if self.transposed else weight)
        if needs_weight:
            grad_weight = torch.mm(input.t(), grad_output) if self.transposed else torch.mm(grad_output.t(), input)
        return grad_input, grad_weight

    @property
    def is_static(self) -> bool:
        """Nothing of it is computed in the graph."""
        return True


LinearParams = ConvParams | MatmulParams


@dataclass(frozen=True)
class LinearOperator:
    """One aten.convolution, mm or addmm node: linear in its weight, output channels along dim 1."""

    node: Node
    input: Node
    weight: Node
    bias: Node | None
    params: LinearParams

    @classmethod
    def of(cls, node: Node) -> LinearOperator | None:
        """The view, or None if `node` is something else."""
        if node.target is aten.convolution.default:
            arguments = bind(node)
            return cls(node, arguments["input"], arguments["weight"], arguments["bias"], ConvParams.of(arguments))
        if node.target is aten.mm.default:
            return cls._product(node, *node.args, bias=None)
        if node.target is aten.addmm.default:
            arguments = bind(node)
            if (arguments["beta"], arguments["alpha"]) == (1, 1) and value(arguments["self"]).dim() == 1:
                return cls._product(node, arguments["mat1"], arguments["mat2"], bias=arguments["self"])
        return None

    @classmethod
    def _product(cls, node: Node, input: Any, matrix: Any, *, bias: Node | None) -> LinearOperator:
        """A linear layer's product reads the transpose of its weight."""
        weight = _transposed(matrix)
        params = MatmulParams(transposed=weight is None)
        return cls(node, input, matrix if weight is None else weight, bias, params)

    @property
    def name(self) -> str:
        """What users call it."""
        return "convolution" if isinstance(self.params, ConvParams) else "linear layer"

    def adjoints(self) -> list[Adjoint]:
        """What computes gradients of this operator, one for each gradient of its output."""
        if isinstance(self.params, MatmulParams):
            return _matmul_backwards(self)
        return [found for user in self.input.users if (found := _convolution_backward(self, user))]


@dataclass
class Adjoint:
    """The nodes that compute gradients of a linear operator from one `grad_output`; those that something reads.

    Attributes:
        node: the first of them.
        weight_is_transposed: `grad_weight` is the transpose of the weight's gradient.
    """

    node: Node
    grad_output: Node
    grad_input: Node | None = None
    grad_weight: Node | None = None
    grad_bias: Node | None = None
    weight_is_transposed: bool = False

    def set_grad_weight(self, node: Node, *, transposed: bool) -> None:
        """Enter the node that computes the weight's gradient."""
        self.grad_weight, self.weight_is_transposed = node, transposed


def _convolution_backward(op: LinearOperator, node: Node) -> Adjoint | None:
    if node.target is not aten.convolution_backward.default:
        return None
    arguments = bind(node)
    if (arguments["input"], arguments["weight"], ConvParams.of(arguments)) != (op.input, op.weight, op.params):
        return None
    grad_input, grad_weight, grad_bias = (output(node, index) for index in range(3))
    if grad_input is grad_weight is grad_bias is None:
        return None
    return Adjoint(node, arguments["grad_output"], grad_input, grad_weight, grad_bias)


Matrix = tuple[Node, bool]
"""A matrix as the node that it is a view of, and whether it is that node's transpose."""


def _matrix(node: Any) -> Matrix:
    flipped = False
    while (source := _transposed(node)) is not None:
        node, flipped = source, not flipped
    return node, flipped


def _transposed(node: Any) -> Node | None:
    """The matrix that `node` is the transpose of, if it was made so."""
    if isinstance(node, Node) and node.target is aten.permute.default and list(node.args[1]) == [1, 0]:  # type: ignore[arg-type]
        return node.args[0]  # type: ignore[return-value]
    return None


def _views(node: Node) -> list[Node]:
    """A matrix, its transposes, theirs, ..."""
    return [node, *(view for user in node.users if _transposed(user) is node for view in _views(user))]


def _matmul_backwards(op: LinearOperator) -> list[Adjoint]:
    """For y = x @ m and g the gradient of y: g @ m.T, and x.T @ g or its transpose g.T @ x."""
    x, w = _matrix(op.input), _matrix(op.weight)
    m_transposed = (w[0], w[1] != op.params.transposed)
    x_transposed = (x[0], not x[1])
    products = {user for view in (*_views(x[0]), *_views(w[0])) for user in view.users if _is_backward_product(user)}
    found: dict[Node, Adjoint] = {}
    for node in sorted(products):
        first, second = node.args
        assert isinstance(first, Node) and isinstance(second, Node)
        transposed = _transposed(first)
        if _matrix(second) == m_transposed:
            _adjoint(found, node, first).grad_input = node
        elif _matrix(first) == x_transposed:
            _adjoint(found, node, second).set_grad_weight(node, transposed=not op.params.transposed)
        elif _matrix(second) == x and transposed is not None:
            _adjoint(found, node, transposed).set_grad_weight(node, transposed=op.params.transposed)
    return list(found.values())


def _is_backward_product(node: Node) -> bool:
    return node.target is aten.mm.default and _torch.is_backward(node) and bool(node.users)


def _adjoint(found: dict[Node, Adjoint], node: Node, grad_output: Node) -> Adjoint:
    return found.setdefault(grad_output, Adjoint(node, grad_output))


@dataclass(frozen=True)
class BatchNorm:
    """One forward batch-norm node of any spelling."""

    node: Node
    input: Node
    training: bool
    has_statistics: bool

    @classmethod
    def of(cls, node: Node) -> BatchNorm | None:
        """The view, or None if `node` is something else."""
        training = _FORWARD_BATCH_NORMS.get(node.target, _MISSING)
        if training is _MISSING:
            return None
        arguments = bind(node)
        training = arguments["training"] if training is None else training
        return cls(node, arguments["input"], training, arguments.get("running_mean") is not None)


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


def linear_operators(graph: Graph) -> Iterator[LinearOperator]:
    """Every linear operator of the graph, in order, as it is when its turn comes."""
    for node in list(graph.nodes):
        op = LinearOperator.of(node)
        if op is not None and not _torch.is_backward(node):
            yield op


class Gradients:
    """Which nodes are made of a tangent; true of nodes that come into the graph later, too."""

    def __init__(self, graph: Graph) -> None:
        tangents = graph.find_nodes(op="placeholder")
        self._known: dict[Node, bool] = {node: node.name.startswith("tangents_") for node in tangents}

    def __contains__(self, node: Node) -> bool:
        pending = [node]
        while pending:
            unknown = [source for source in pending[-1].all_input_nodes if source not in self._known]
            if unknown:
                pending += unknown
            else:
                last = pending.pop()
                self._known.setdefault(last, any(self._known[source] for source in last.all_input_nodes))
        return bool(self._known[node])


def is_kept(node: Node) -> bool:
    """True if a linear operator needs the node, or a view of it, in backward: it is saved, or made from what is."""
    readers = [reader for reader in node.users if _torch.is_backward(reader)]
    if any(_needs(reader, node) for reader in readers):
        return True
    return any(is_kept(user) for user in node.users if _torch.is_view(user))


def kept_copies(node: Node) -> list[Node]:
    """The node, and casts of it to a narrower dtype, each if it, or a padded copy of it, is kept."""
    narrowed = [user for user in node.users if user.target is convert_element_type and _is_narrower(user, node)]
    return [copy for copy in (node, *narrowed) if any(map(is_kept, (copy, *_padded(copy))))]


def _is_narrower(node: Node, other: Node) -> bool:
    return value(node).is_floating_point() and value(node).dtype.itemsize < value(other).dtype.itemsize


def _padded(node: Node) -> list[Node]:
    return [user for user in node.users if user.target is aten.constant_pad_nd.default]


def _needs(reader: Node, node: Node) -> bool:
    """True if a linear operator of backward reads the node's values; of some operands only the shape matters."""
    if reader.target is not aten.convolution_backward.default:
        return reader.target in _PRODUCTS
    arguments = bind(reader)
    input_matters, weight_matters = arguments["output_mask"][1], arguments["output_mask"][0]
    read = {"grad_output": True, "input": input_matters, "weight": weight_matters}
    return any(arguments[name] is node and matters for name, matters in read.items())


_PRODUCTS = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default})


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

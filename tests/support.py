"""What the tests share: batch norms that are never default, every gradient, captured joint graphs, saved bytes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convbn_compile import _torch
from convbn_compile.options import Options


def randomise(model: nn.Module) -> nn.Module:
    """Give every batch norm statistics and affine parameters that no default hides, and freeze it in eval mode."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                if module.running_mean is not None:
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2)
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5).mul_(torch.randn_like(module.weight).sign())
                if module.bias is not None:
                    module.bias.normal_()
    return model.eval()


def compiled(model: Any, mode: str = "tune", lowering: str = "aot_eager", **options: Any) -> Callable[..., Any]:
    """The model through the backend, by default without code generation."""
    return torch.compile(model, backend="convbn_tune", options={"mode": mode, "lowering": lowering, **options})


def run(function: Callable[..., Any], model: nn.Module | None, *inputs: Tensor) -> dict[str, Tensor | None]:
    """Output and every gradient, of parameters and inputs, for one random cotangent."""
    parameters = dict(model.named_parameters()) if model is not None else {}
    leaves = {**parameters, **{f"input {i}": value for i, value in enumerate(inputs)}}
    for leaf in leaves.values():
        leaf.grad = None
    output = function(*inputs)
    if output.requires_grad:
        cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (output.double() * cotangent).sum().backward()
    return {"output": output.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def relative_errors(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> dict[str, float]:
    """Largest absolute difference over the largest absolute value, for each tensor; None must meet None."""
    errors = {}
    for name, want in wanted.items():
        got = found[name]
        assert (got is None) == (want is None), f"{name}: {got} but eager {want}"
        if want is not None and got is not None:
            assert got.shape == want.shape, name
            assert got.dtype == want.dtype, name
            errors[name] = difference(got, want) / (magnitude(want) or 1.0)
    return errors


def magnitude(tensor: Tensor) -> float:
    """The largest finite one of its elements."""
    finite = tensor[tensor.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def difference(got: Tensor, want: Tensor) -> float:
    """The largest there is: none between equal infinities, infinite where it is NaN, which max() would pass over."""
    if not want.numel():
        return 0.0
    largest = torch.where(got == want, 0, (got - want).abs()).max().item()
    return math.inf if math.isnan(largest) else largest


def assert_as_eager(
    model: nn.Module,
    *inputs: Tensor,
    folded: int | None = None,
    output: float = 1e-10,
    gradients: float = 1e-8,
    **options: Any,
) -> None:
    """Outputs and every gradient as eager's, and so many pairs folded."""
    wanted = run(model, model, *inputs)
    with counted() as counts:
        found = run(compiled(model, **options), model, *inputs)
    errors = relative_errors(found, wanted)
    assert errors.pop("output") <= output
    bad = {name: error for name, error in errors.items() if not error <= gradients}
    assert not bad
    if folded is not None:
        assert counts.folded == folded


@dataclass
class Counts:
    """What the joint pass did while one looked."""

    folded: int = 0
    merged: int = 0
    convolutions_gone: int = 0
    refused: list[Any] = field(default_factory=list)
    rewrites: list[Any] = field(default_factory=list)
    graphs: int = 0

    @property
    def reasons(self) -> list[str]:
        return [refusal.reason for refusal in self.refused]


@contextlib.contextmanager
def counted() -> Iterator[Counts]:
    """Count what the joint pass folds and refuses inside."""
    from convbn_compile import joint_pass

    counts, original = Counts(), joint_pass.run

    def counting(graph: fx.Graph, **kwargs: Any) -> Any:
        convolutions = _num_convolutions(graph)
        report = original(graph, **kwargs)
        counts.convolutions_gone += convolutions - _num_convolutions(graph.owning_module.graph)
        counts.graphs += 1
        counts.folded += report.folded
        counts.merged += report.merged
        counts.rewrites += report.rewrites
        counts.refused += report.refused
        return report

    joint_pass.run = counting
    try:
        yield counts
    finally:
        joint_pass.run = original


def _num_convolutions(graph: fx.Graph) -> int:
    return len(graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default))


def joint_graph(model: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """The joint (or inference) graph that the joint pass would see, captured, with its batch norms whole.

    A joint graph is neither partitioned nor run.
    """
    captured: list[fx.GraphModule] = []

    def capture(graph: fx.Graph) -> None:
        captured.append(copied(graph.owning_module))

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        return _torch.compile_with_aot_eager(gm, example_inputs, joint_pass=capture, config={}, memory_budget=1.0)

    done = _torch.visible_through_dynamo(ValueError("nothing is left to see"))
    with mock.patch.object(_torch, "partition", side_effect=done), contextlib.suppress(type(done)):
        torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    assert len(captured) == 1, f"{len(captured)} graphs"
    return captured[0]


def copied(module: fx.GraphModule) -> fx.GraphModule:
    from convbn_compile._splice import copy_graph

    return fx.GraphModule(module, copy_graph(module.graph))


def operators(graph: fx.Graph) -> dict[str, int]:
    """How many calls of each operator."""
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            counts[str(node.target)] = counts.get(str(node.target), 0) + 1
    return counts


def options(**given: Any) -> Options:
    """Parsed options."""
    return Options.parse(options=given)

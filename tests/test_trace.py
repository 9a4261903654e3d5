"""What is traced is what make_fx traces, once for tensors of which the same is true."""

from dataclasses import dataclass

import pytest
import torch
from support import operators
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from convbn_compile import _torch, _trace
from convbn_compile._trace import Traces, trace

aten = torch.ops.aten


def fakes(*tensors):
    mode = FakeTensorMode(shape_env=ShapeEnv())
    return [None if tensor is None else mode.from_tensor(tensor, static_shapes=True) for tensor in tensors]


def nodes(graph):
    """Every node: what it calls, which nodes it reads, and what stands for it."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    return [
        (
            node.target if node.op == "call_function" else node.op,
            torch.fx.node.map_arg((node.args, node.kwargs), order.__getitem__),
            facts(node.meta.get("val")),
        )
        for node in graph.nodes
    ]


def facts(value):
    if isinstance(value, (tuple, list)):
        return [facts(item) for item in value]
    return None if value is None else (value.shape, value.stride(), value.dtype, value.device)


def batch_norm(input, weight, mean, var):
    return aten._native_batch_norm_legit_no_training.default(input, weight, None, mean, var, 0.1, 1e-5)


def batch_norm_backward(input, weight, mean, var):
    rest = (None, None, False, 1e-5, [True, True, True])
    return aten.native_batch_norm_backward.default(input * 2, input, weight, mean, var, *rest)


def convolution(input, weight, mean, var):
    kernel = (weight * torch.rsqrt(var + 1)).reshape(-1, 1, 1, 1).expand(4, 4, 3, 3).to(input.dtype)
    output = aten.convolution.default(input, kernel, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    return aten.convolution_backward.default(
        output, input, kernel, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
    )[:2]


def matrices(input, weight, mean, var):
    square = (torch.arange(4, device=input.device) == torch.arange(4).reshape(-1, 1)).to(input.dtype)
    unused = input.exp()
    padded = nn.functional.pad(square @ weight.reshape(4, 1), (1, 1))
    return padded.clamp(-1, 1).sum(0), None, (input.transpose(1, 2) + 1).contiguous(), unused.new_ones(3), mean


@pytest.mark.parametrize("function", [batch_norm, batch_norm_backward, convolution, matrices])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_make_fx(function, dtype, monkeypatch):
    image = torch.randn(2, 4, 5, 6, dtype=dtype).to(memory_format=torch.channels_last)
    arguments = fakes(image, *(torch.rand(4) for _ in range(3)))
    wanted = _torch.traced_by_make_fx(function, arguments)
    wanted.eliminate_dead_code()
    monkeypatch.setattr(_torch, "traced_by_make_fx", None)
    traced = trace(function, arguments)
    traced.graph.lint()
    assert nodes(traced.graph) == nodes(wanted)


def written(input):
    copy = input.clone()
    copy[0].add_(1)
    return copy


def constant(input):
    return input + torch.tensor([1.0, 2.0])


def number_of_elements(input):
    return input.new_ones(input.shape[0] * 2)


@pytest.mark.parametrize("function", [written, constant])
def test_what_is_not_recorded_is_traced_by_make_fx(function):
    (argument,) = fakes(torch.randn(2))
    assert nodes(trace(function, [argument]).graph) == nodes(_torch.traced_by_make_fx(function, [argument]))


@pytest.mark.filterwarnings("ignore")  # of fx, that a size is in the graph as it is
def test_arithmetic_of_dynamic_sizes_is_traced_by_make_fx():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    argument = mode.from_tensor(torch.randn(3, 2))
    counts = operators(trace(number_of_elements, [argument]).graph)
    assert counts["aten.sym_size.int"] == 1
    assert counts["<built-in function mul>"] == 1


def test_a_dynamic_number_is_an_argument():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    argument = mode.from_tensor(torch.randn(3, 2))
    traced = Traces().of(lambda image, number: image + number, [argument, argument.shape[0]])
    assert len(traced.graph.find_nodes(op="placeholder")) == 2
    assert operators(traced.graph) == {"aten.add.Tensor": 1}


@dataclass(frozen=True)
class Times:
    number: float

    def __call__(self, first, second):
        return (first * self.number).view(-1) + second.reshape(-1)


@pytest.fixture
def recorded(monkeypatch):
    """How often a function was recorded."""
    seen, record = [], _trace._recorded

    def counting(function, given):
        seen.append(function)
        return record(function, given)

    monkeypatch.setattr(_trace, "_recorded", counting)
    return seen


def test_the_same_is_traced_once_with_fake_tensors_of_its_own(recorded):
    traces = Traces()
    first, second = (traces.of(Times(2), fakes(torch.randn(2, 3), torch.randn(3, 2))) for _ in range(2))
    assert len(recorded) == 1
    assert first.graph is second.graph
    for node in list(first.graph.nodes)[2:-1]:
        mine, other = first.fakes[node], second.fakes[node]
        assert facts(mine) == facts(other)
        assert mine.untyped_storage()._cdata != other.untyped_storage()._cdata
    multiplied, viewed = (second.fakes[node] for node in list(first.graph.nodes)[2:4])
    assert multiplied.untyped_storage()._cdata == viewed.untyped_storage()._cdata


def test_another_function_size_stride_dtype_or_alias_is_traced_anew(recorded):
    traces, x = Traces(), torch.randn(2, 2)
    same = fakes(x) * 2
    for function, arguments in [
        (Times(2), fakes(x, x.clone())),
        (Times(3), fakes(x, x.clone())),
        (Times(2), fakes(x, torch.randn(4))),
        (Times(2), fakes(x, x.t())),
        (Times(2), fakes(x, x.double())),
        (Times(2), same),
    ]:
        traces.of(function, arguments)
        traces.of(function, arguments)
    assert len(recorded) == 6


def test_dynamic_sizes_are_traced_anew(recorded):
    mode, traces = FakeTensorMode(shape_env=ShapeEnv()), Traces()
    arguments = [mode.from_tensor(torch.randn(3, 2)), mode.from_tensor(torch.randn(3, 2))]
    assert not isinstance(arguments[0].shape[0], int)
    traces.of(Times(2), arguments)
    traces.of(Times(2), arguments)
    assert len(recorded) == 2

"""The coupling's inverse in float64, its special cases, and a mutant."""

import pytest
import torch
from torch import nn

from convbn_compile.reversible import coupling

PAIRS = [(1.0, 0.125), (1.0, 0.1), (0.75, 0.25), (0.5, 0.5), (0.3, 0.7), (0.0, 1.0), (1.0, 1.0), (0.9, 0.3)]


def blocks(count):
    return [nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double() for _ in range(count)]


def random(count=2):
    return [torch.randn(3, 6, dtype=torch.float64) for _ in range(count)]


def g(block, x, alpha):
    return block(x) + alpha * x


@pytest.mark.parametrize(("alpha", "beta"), PAIRS)
def test_the_inverse(alpha, beta):
    (block,), (x, y) = blocks(1), random()
    after, second = coupling.forward(g(block, x, alpha), x, y, beta)
    before = coupling.input_of(second, beta)
    torch.testing.assert_close(before, x, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(coupling.second_of(after, g(block, before, alpha)), y, rtol=1e-13, atol=1e-13)


def test_mutant_fails():
    """The streams the other way round: y' = beta * x'."""
    (block,), (x, y) = blocks(1), random()
    after, _ = coupling.forward(g(block, x, 1.0), x, y, 0.5)
    assert (coupling.input_of(0.5 * after, 0.5) - x).abs().max() > 0.1


@pytest.mark.parametrize(("alpha", "beta"), PAIRS)
def test_one_stream_with_two_residual_connections(alpha, beta):
    """x_i = F(x_{i-1}) + alpha x_{i-1} + beta x_{i-2}, with x_{-1} = x_0."""
    chain, (x,) = blocks(4), random(1)
    streams, history = coupling.start(x, beta), [x, x]
    for block in chain:
        streams = coupling.forward(g(block, streams[0], alpha), *streams, beta)
        history.append(block(history[-1]) + alpha * history[-1] + beta * history[-2])
    torch.testing.assert_close(streams[0], history[-1], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(streams[1], beta * history[-2], rtol=1e-13, atol=1e-13)
    wanted = (history[-1] + beta * history[-2]) / (1 + beta)
    torch.testing.assert_close(coupling.end(*streams, beta), wanted, rtol=1e-13, atol=1e-13)


def test_without_the_second_stream_it_is_the_pretrained_network():
    chain, (x,) = blocks(4), random(1)
    streams, wanted = coupling.start(x, 0.0), x
    for block in chain:
        streams, wanted = coupling.forward(g(block, streams[0], 1.0), *streams, 0.0), block(wanted) + wanted
    assert torch.equal(coupling.end(*streams, 0.0), wanted)


def test_without_the_first_residual_it_is_revnet():
    """Y1 = X1 + F(X2), Y2 = X2 + G(Y1), of the input twice."""
    (f, h), (x,) = blocks(2), random(1)
    streams = coupling.start(x, 1.0)
    for block in (f, h):
        streams = coupling.forward(block(streams[0]), *streams, 1.0)
    first = x + f(x)
    assert torch.equal(streams[1], first)
    assert torch.equal(streams[0], x + h(first))

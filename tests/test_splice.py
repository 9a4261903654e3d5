"""A tensor replaced by one that lies otherwise in memory: what is made of it is found anew."""

import pytest
import torch
from support import operators
from torch.fx.experimental.proxy_tensor import make_fx

from convbn_compile._splice import replace, restride


def replaced(function):
    """The graph of a function of x + y, with another tensor in its place."""

    def both(x, y):
        lies_otherwise = y.t().contiguous().t() * 1
        return function(x + y), lies_otherwise

    graph = make_fx(both, tracing_mode="fake")(torch.randn(2, 3), torch.randn(2, 3)).graph
    new = graph.output_node().args[0][1]
    (old,) = graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    replace(old, new)
    return graph


def test_views_become_reshapes_where_they_must():
    graph = replaced(lambda z: (z.relu().view(6), z.view(2, 3, 1)))
    restride(graph)
    graph.lint()
    counts = operators(graph)
    assert (counts["aten.reshape.default"], counts["aten.view.default"]) == (1, 1)
    relu = next(node for node in graph.nodes if "relu" in str(node.target))
    assert relu.meta["val"].stride() == (1, 2)


def test_what_reads_memory_as_it_lies_is_an_error():
    with pytest.raises(RuntimeError, match="as_strided reads memory that is laid out otherwise"):
        restride(replaced(lambda z: z.as_strided((3,), (1,))))


def test_nothing_is_touched_where_the_memory_is_the_same():
    graph = make_fx(lambda x: (x + 1).view(6), tracing_mode="fake")(torch.randn(2, 3)).graph
    before = str(graph)
    restride(graph)
    assert str(graph) == before

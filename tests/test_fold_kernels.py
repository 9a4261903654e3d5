"""Kernels of the fold: how many, that together they compute the same, and how much folded weights take at a time."""

from operator import getitem

import pytest
import torch
from fold_kernels import SETTINGS, chain, compiled, count
from support import assert_as_eager, joint_graph, magnitude, operators, randomise, run
from support import compiled as on_backend
from torch import fx, nn

from convbn_compile import _fold_kernels, _torch, joint_pass
from convbn_compile._fold_kernels import FOLDED, add_shifts_apart, reduce_kernels, write_channels_last, write_together

aten = torch.ops.aten
TOGETHER = aten._foreach_mul.Scalar


def kernels(pairs):
    """Calls and loops more than the fused network has."""
    x = torch.randn(2, 8, 12, 12)
    net = randomise(chain(pairs))
    tune, fused = (count(compiled(net, name, SETTINGS[name]), x) for name in ("Tune", "fused network"))
    return {name: tune[name] - fused[name] for name in tune}


@pytest.mark.usefixtures("vectorised")
def test_kernels_more_than_those_of_the_fused_network():
    """On a CPU none in forward and one a pair in backward, where convolution_backward comes in between.

    The last activation's mask is saved as bits besides: a loop that packs them, a call that unpacks them.
    """
    assert [kernels(pairs) for pairs in (2, 3)] == [
        {"forward": 0, "backward": pairs + 1, "loops forward": pairs + 1, "loops backward": 8 * pairs}
        for pairs in (2, 3)
    ]


def graphs(net, *inputs):
    """Forward and backward as Inductor gets them in Tune mode."""
    joint = joint_graph(net, *inputs)
    joint_pass.run(joint.graph)
    return _torch.partition(joint, (), num_fwd_outputs=_torch.num_forward_outputs(joint.graph))


class Mixed(nn.Module):
    """A residual network with every kind of weight that is folded: grouped, depthwise, transposed, of branches."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.wide, self.narrow = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.rest = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.SiLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU(),
            nn.ConvTranspose2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8),
        )  # fmt: skip

    def forward(self, x):
        x = self.first(x)
        x = (self.norms[0](self.wide(x)) + self.norms[1](self.narrow(x)) + self.norms[2](x)).relu()
        return (self.rest(x) + x).relu()


def together(graph):
    """Two or three weights of float64 a chunk."""
    write_together(graph, device="cpu", chunk=8000)


def apart(graph):
    add_shifts_apart(graph, device="cpu")


def reduced_by(monkeypatch, *passes):
    """Run passes on graphs of a CPU, forward and backward; the operators of each."""
    done = []
    compile_as_is = _torch._as_is

    def reduced(module):
        for graph_pass in passes:
            graph_pass(module.graph)
        module.graph.lint()
        module.recompile()
        done.append(operators(module.graph))
        return compile_as_is(module)

    monkeypatch.setattr(_torch, "_as_is", reduced)
    return done


def test_all_of_them_compute_the_same(monkeypatch):
    graphs = reduced_by(monkeypatch, apart, together, write_channels_last)
    net, x = randomise(Mixed().double()), torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    assert_as_eager(net, x, fold="always")
    assert [graph[str(TOGETHER)] for graph in graphs] == [2, 2]


def test_weights_that_are_written_together_are_the_same_bits(monkeypatch):
    net, x = randomise(Mixed()), torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = run(on_backend(net, fold="always"), net, x)
        torch._dynamo.reset()
        graphs = reduced_by(monkeypatch, together)
        found = run(on_backend(net, fold="always"), net, x)
    assert [graph[str(TOGETHER)] for graph in graphs] == [1, 1]
    assert not [name for name, want in wanted.items() if want is not None and magnitude(found[name] - want)]


def test_shifts_are_added_apart():
    forward, _ = graphs(randomise(chain(3)), torch.randn(2, 8, 6, 6))
    add_shifts_apart(forward.graph, device="cpu")
    assert [node.args[2] for node in forward.graph.find_nodes(op="call_function", target=aten.convolution.default)] == (
        [None] * 3
    )


def alive(graph: fx.Graph) -> int:
    """The most bytes that folded weights have at a time, each from where it is written to where it is last read."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    read = {node: max(order[user] for user in node.users) for node in graph.nodes if FOLDED in node.meta and node.users}
    spans = [
        (order[node.args[0] if node.target is getitem else node], last, node.meta["val"].nbytes)
        for node, last in read.items()
        if not any(user.target is TOGETHER for user in node.users)
    ]
    return max(sum(size for first, last, size in spans if first <= at <= last) for at in range(len(order)))


@pytest.mark.parametrize("pairs", [5, 7])
def test_chunks_bound_both_kernels_and_bytes(pairs):
    """Three weights fit into a chunk; in backward the first convolution, whose input needs no gradient, has none."""
    size = 8 * 8 * 9 * 4
    for module, folds in zip(graphs(randomise(chain(pairs)), torch.randn(2, 8, 6, 6)), (pairs, pairs - 1), strict=True):
        assert sum(FOLDED in node.meta for node in module.graph.nodes) == folds
        before = alive(module.graph)
        write_together(module.graph, device="cpu", chunk=3 * size)
        together = module.graph.find_nodes(op="call_function", target=TOGETHER)
        assert [len(node.args[0]) for node in together] == [3] * (folds // 3) + [folds % 3] * (folds % 3 > 1)
        assert before == size
        assert alive(module.graph) == 3 * size
        module.graph.lint()


def test_a_chunk_is_written_where_the_first_weight_is_read():
    """Backward starts with the last convolutions."""
    _, backward = graphs(randomise(chain(4)), torch.randn(2, 8, 6, 6))
    write_together(backward.graph, device="cpu")
    convolutions = backward.graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
    (together,) = backward.graph.find_nodes(op="call_function", target=TOGETHER)
    read = [node.args[2] for node in convolutions if node.args[2].op == "call_function"]
    assert [node.args for node in read] == [(together, index) for index in range(3)]
    assert together < convolutions[0]


def test_saved_are_the_same_tensors():
    net, x = randomise(chain(3)), torch.randn(2, 8, 6, 6)
    plain, changed = (graphs(net, x)[0] for _ in range(2))
    write_together(changed.graph, device="cpu")
    assert [node.name for node in plain.graph.output_node().args[0]] == [
        node.name for node in changed.graph.output_node().args[0]
    ]


def test_weights_of_other_devices_and_of_unknown_sizes_are_left_alone():
    forward, _ = graphs(randomise(chain(3)), torch.randn(2, 8, 6, 6))
    before = operators(forward.graph)
    write_together(forward.graph)
    add_shifts_apart(forward.graph)
    assert operators(forward.graph) == before


def test_a_failure_leaves_the_graph_as_it_was(monkeypatch):
    def fail(graph):
        graph.erase_node(graph.output_node())
        raise RuntimeError("no")

    monkeypatch.setattr(_fold_kernels, "write_channels_last", fail)
    forward, _ = graphs(randomise(chain(2)), torch.randn(2, 8, 6, 6))
    before = operators(forward.graph)
    with pytest.warns(UserWarning, match="did not put kernels together"):
        reduce_kernels(forward.graph)
    assert operators(forward.graph) == before
    forward.graph.output_node()

"""The joint pass on captured joint graphs: what it inserts, what it leaves, metadata, and failure."""

import warnings

import pytest
import torch
from support import assert_as_eager, compiled, copied, counted, joint_graph, operators, randomise
from test_backend import double, pair
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy

from convbn_compile import _cached_report, _rewrite, _torch, backend, joint_pass, lowering
from convbn_compile.identities import (
    affine_of_linear,
    bits_of_mask,
    crop_of_pad,
    mask_of_clamp,
    shape_of_input,
    sign_of_output,
)
from convbn_compile.report import Report

CONVOLUTION, BACKWARD = "aten.convolution.default", "aten.convolution_backward.default"


def run(module):
    """The graph after the pass, and its report."""
    report = joint_pass.run(module.graph)
    return module.graph, report


def test_a_pair_becomes_one_convolution_forward_and_one_backward():
    graph, report = run(joint_graph(pair(), double(2, 4, 8, 8)))
    graph.lint()
    counts = operators(graph)
    assert report.folded == 1
    assert (counts[CONVOLUTION], counts[BACKWARD]) == (1, 1)
    assert not any("batch_norm" in name for name in counts)


def test_no_convolution_output_is_saved():
    """What is saved is what the fused network saves: the inputs of the convolutions."""
    model = randomise(nn.Sequential(pair(), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).double())
    before = joint_graph(model[1:], double(2, 8, 8, 8))
    graph, _ = run(copied(before))
    assert _saved(before.graph) == {"convolution", "relu"}
    assert _saved(graph) == {"relu"}


def _saved(graph):
    """Names, without their numbers, of what is saved besides inputs."""
    module = torch.fx.GraphModule(graph.owning_module, graph)
    outputs = _torch.num_forward_outputs(graph)
    module = copied(module)
    joint_pass.decompose_batch_norms(module.graph)
    forward, _ = _torch.partition(module, (), num_fwd_outputs=outputs)
    saved = [node for node in forward.graph.output_node().args[0][outputs:] if node.op != "placeholder"]
    return {node.name.rstrip("_0123456789") for node in saved}


def test_the_fold_is_recomputed_in_backward():
    graph, _ = run(joint_graph(pair(), double(2, 4, 8, 8)))
    (convolution,) = graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default)
    folded = convolution.args[1]
    assert folded.meta["recompute"] is CheckpointPolicy.MUST_RECOMPUTE
    assert convolution.meta.get("recompute") is None


def test_metadata_is_kept():
    graph, _ = run(joint_graph(pair(), double(2, 4, 8, 8)))
    for node in graph.nodes:
        if node.op == "call_function" and str(node.target) in (CONVOLUTION, BACKWARD):
            assert "val" in node.meta
            assert "seq_nr" in node.meta
            assert node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")


def test_refused_norms_become_what_inductor_makes_of_them():
    model = randomise(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)).double())
    graph, report = run(joint_graph(model, double(2, 4, 8, 8)))

    def backend(gm, inputs):
        from torch._dynamo.backends.common import aot_autograd

        def partition(joint, joint_inputs, **kwargs):
            plain.append(operators(joint.graph))
            return _torch.partition(joint, joint_inputs, **kwargs)

        return aot_autograd(
            fw_compiler=lambda module, _: _torch._as_is(module),
            partition_fn=partition,
            decompositions=_torch.default_decompositions(),
        )(gm, inputs)

    plain = []
    torch.compile(model, backend=backend)(double(2, 4, 8, 8))
    assert report.folded == 0
    names = ("mul", "add", "sub", "rsqrt", "sqrt", "reciprocal", "sum", "unsqueeze")
    ours = {name: count for name, count in operators(graph).items() if name.split(".")[1] in names}
    assert ours == {name: count for name, count in plain[0].items() if name.split(".")[1] in names}


def test_a_report_names_modules():
    model = nn.Sequential(pair(), nn.ReLU(), randomise(nn.BatchNorm2d(8)).double())
    _, report = run(joint_graph(model, double(2, 4, 8, 8)))
    assert [item.module for item in report.rewrites] == ["0.1"]
    assert [(item.module, item.reason) for item in report.refused] == [
        ("2", "its input comes from aten.relu, not from a convolution or linear layer")
    ]


def test_a_functional_norm_is_named_by_its_line():
    def function(x, weight, mean, var):
        return torch.nn.functional.batch_norm(torch.nn.functional.conv2d(x, weight), mean, var)

    x, weight = double(2, 4, 8, 8), double(8, 4, 3, 3)
    graph = joint_graph(function, x, weight, torch.zeros(8).double(), torch.ones(8).double())
    _, report = run(graph)
    assert __file__ in report.rewrites[0].module


def test_the_pass_can_run_on_its_own_result():
    module = joint_graph(pair(), double(2, 4, 8, 8))
    run(module)
    counts = operators(module.graph)
    graph, report = run(module)
    assert (report.norms, operators(graph)) == (0, counts)


# --- failure -----------------------------------------------------------------------------------------------------

STAGES = [
    (joint_pass, "copy_graph"),
    (joint_pass, "decompose_batch_norms"),
    (joint_pass, "cancel_aliases"),
    (joint_pass, "linear_operators"),
    (joint_pass, "follow"),
    (joint_pass, "share_casts"),
    (joint_pass, "parallel"),
    (joint_pass, "match"),
    (joint_pass.cost, "objection"),
    (joint_pass, "rewrite"),
    (_rewrite, "splice"),
    (_rewrite, "_rewrite_backward"),
    (affine_of_linear, "fold"),
    (shape_of_input, "match"),
    (mask_of_clamp, "match"),
    (sign_of_output, "match"),
    (crop_of_pad, "match"),
    (bits_of_mask, "match"),
    (joint_pass, "save_reads_of"),
    (joint_pass, "report_of"),
]
IDS = [f"{module.__name__}.{name}" for module, name in STAGES]


@pytest.mark.parametrize(("module", "name"), STAGES, ids=IDS)
def test_a_failure_leaves_the_graph_and_training_goes_on(module, name, monkeypatch):
    fail(module, name, "aot_eager", monkeypatch)


@pytest.mark.parametrize(("module", "name"), [STAGES[0], STAGES[11], STAGES[-1]], ids=[IDS[0], IDS[11], IDS[-1]])
def test_a_failure_leaves_the_graph_to_inductor(module, name, monkeypatch):
    """Before anything is rewritten, within, and after."""
    fail(module, name, "inductor", monkeypatch)


def fail(module, name, lowered, monkeypatch):
    monkeypatch.setattr(module, name, _broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert_as_eager(pair(), double(2, 4, 8, 8), lowering=lowered)
    messages = [str(warning.message) for warning in caught if "convbn_tune" in str(warning.message)]
    assert len(messages) == 1
    assert "its own pass failed" in messages[0]
    assert "RuntimeError: broken" in messages[0]
    assert "Please report" in messages[0]


@pytest.mark.filterwarnings("ignore:convbn_tune left a graph as it was")
def test_a_failure_leaves_no_batch_norm_whole(monkeypatch):
    """Eager's backward of a norm has other strides than are traced: a view of its result may not exist."""
    monkeypatch.setattr(joint_pass, "decompose_batch_norms", _broken)
    linear = nn.Linear(4, 4, bias=False)
    rows = nn.Sequential(Transposed(), linear, Transposed(), nn.BatchNorm1d(4), nn.Tanh())
    assert_as_eager(randomise(rows.double()), double(2, 4, 3), lowering="aot_eager")


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


TELLING = [
    (lowering, "saved_bytes"),
    (_cached_report, "key"),
    (_cached_report, "store"),
    (Report, "summary"),
    (backend, "_nothing_folded"),
]


@pytest.mark.parametrize(("module", "name"), TELLING, ids=[f"{module.__name__}.{name}" for module, name in TELLING])
def test_a_failure_to_tell_costs_no_training(module, name, monkeypatch, caplog):
    monkeypatch.setattr(module, name, _broken)
    warnings.filterwarnings("ignore", message="convbn_tune folded no batch norm")
    caplog.set_level("INFO", "convbn_compile")
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)).double().eval()
    with pytest.warns(UserWarning, match="broken.*Please report") as caught:
        assert_as_eager(model, double(2, 4, 8, 8))
    assert len([warning for warning in caught if "Please report" in str(warning.message)]) <= 2


def _broken(*args, **kwargs):
    raise RuntimeError("broken")


def test_a_failure_is_reported_as_refused(monkeypatch):
    monkeypatch.setattr(joint_pass, "follow", _broken)
    module = joint_graph(pair(), double(2, 4, 8, 8))
    with pytest.warns(UserWarning, match="its own pass failed"), counted():
        report = joint_pass.run(module.graph)
    assert [item.reason for item in report.refused] == ["the pass failed: RuntimeError: broken"]
    (convolution,) = module.graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default)
    assert convolution.args[1].op == "placeholder"


def test_tune_that_folds_nothing_warns_once_and_says_what_to_do():
    model = pair().train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        compiled(model)(double(2, 4, 8, 8))
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1
    assert "folded no batch norm" in messages[0]
    assert (
        "it runs on batch statistics (training mode). Freeze it before compiling: convbn_compile.turn_on" in messages[0]
    )


def test_the_warning_is_shown_once_for_many_graphs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([pair(nn.Conv2d(4, 8, 3)), pair(nn.Conv2d(8, 8, 3))])

        def forward(self, x):
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
            return self.blocks[1](x)

    model = Two().train()
    with warnings.catch_warnings(record=True) as caught, counted() as counts:
        warnings.simplefilter("default")
        tuned = torch.compile(model, backend="convbn_tune", dynamic=False, options={"lowering": "aot_eager"})
        for size in (8, 9):
            tuned(double(2, 4, size, 8))
    assert counts.graphs == 4
    assert len(caught) == 1


def test_a_norm_without_statistics_is_not_told_to_freeze():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)).double().eval()
    with pytest.warns(UserWarning, match="it has no running statistics.*explain") as caught:
        compiled(model)(double(2, 4, 8, 8))
    assert "turn_on" not in str(caught[0].message)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_other_modes_do_not_warn_of_batch_statistics(mode):
    compiled(pair().train(), mode=mode)(double(2, 4, 8, 8))

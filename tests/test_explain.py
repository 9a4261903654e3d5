"""explain and Report: every norm is named, with a reason where it is left alone; the model is left as it was."""

import contextlib
import copy
import importlib
import inspect
import json
import logging

import pytest
import torch
from support import compiled, counted, randomise
from test_backend import Net, double, output_read_elsewhere, pair
from torch import nn

import convbn_compile as cb

explain = importlib.import_module("convbn_compile.explain")  # the name is the function's in the package


APART = "isolate_recompiles" in inspect.signature(torch.compile).parameters
FEW = torch._dynamo.config.patch(recompile_limit=3)


def mixed():
    """A folded norm, one after a ReLU, one on batch statistics."""
    model = randomise(nn.Sequential(pair(), nn.ReLU(), nn.BatchNorm2d(8), pair(nn.Conv2d(8, 8, 1))).double())
    model[3][1].train()
    return model


def test_every_norm_has_a_line():
    report = cb.explain(mixed(), double(2, 4, 8, 8))
    assert report.folded == 1
    assert report.merged == 0
    assert report.refused == (
        cb.Refusal("2", "its input comes from aten.relu, not from a convolution or linear layer"),
        cb.Refusal("3.1", "it runs on batch statistics (training mode)"),
    )
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["0.1", "2", "3.1"]
    assert report.saved_bytes_after <= report.saved_bytes_before


def test_to_dict_is_json_and_back():
    report = cb.explain(mixed(), double(2, 4, 8, 8))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["folded"] == 1
    assert data["refused"][0] == {
        "module": "2",
        "reason": "its input comes from aten.relu, not from a convolution or linear layer",
        "kind": "batch norm",
    }
    assert cb.Report.from_dict(data) == report


def test_the_model_is_left_as_it_was():
    model = mixed()
    before = copy.deepcopy(model)
    random = torch.get_rng_state()
    cb.explain(model, double(2, 4, 8, 8, requires_grad=False))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before.buffers(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
    torch.set_rng_state(random)
    double(2, 4, 8, 8, requires_grad=False)
    assert torch.equal(torch.get_rng_state(), torch.get_rng_state())


@FEW
def test_explain_does_not_use_up_the_models_recompilations():
    model, x = cb.turn_on(pair(), lowering="aot_eager"), double(2, 4, 8, 8)
    for _ in range(4):
        cb.explain(model, x)
    with counted() as counts:
        model(x)
    assert counts.graphs == 1


def test_lazy_and_compiled_models_are_explained():
    lazy = nn.Sequential(nn.LazyConv2d(8, 3), nn.BatchNorm2d(8)).eval()
    assert cb.explain(lazy, torch.randn(2, 4, 8, 8)).folded == 1
    report = cb.explain(torch.compile(pair(), backend="eager"), double(2, 4, 8, 8))
    assert [rewrite.module for rewrite in report.rewrites] == ["1"]


class Changes(nn.Module):
    """Its forward changes its input, a weight and a buffer in place, and binds another buffer anew."""

    def __init__(self):
        super().__init__()
        self.block = pair()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x):
        self.calls.add_(1)
        self.last = x.detach().flatten()[:1] + 1
        with torch.no_grad():
            self.block[0].weight.mul_(1.5)
        return self.block(x.mul_(2))


@pytest.mark.parametrize("inference", [False, True])
def test_what_forward_changes_is_put_back(inference):
    model = Changes()
    last, kept = model.last, copy.deepcopy(model.state_dict())
    with torch.inference_mode(inference):
        x = double(2, 4, 8, 8, requires_grad=False)
        before = x.clone()
        report = cb.explain(model, x)
    assert (report.folded, report.norms) == (int(inference), 1)  # backward would keep a weight that is computed
    assert torch.equal(x, before)
    assert model.last is last
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_a_model_that_is_on_can_be_explained_and_stays_on():
    model = cb.turn_on(pair(), lowering="aot_eager")
    assert cb.explain(model, double(2, 4, 8, 8)).folded == 1
    with pytest.raises(ValueError, match="already compiled"):
        cb.turn_on(model)


@FEW
def test_often_and_without_grad_and_by_keyword():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = pair()

        def forward(self, *, images):
            return self.block(images)

    model = Keyword()
    for size in range(1, 6):  # more often than Dynamo's recompile limit
        assert cb.explain(model, images=double(size, 4, 8, 8)).folded == 1
    with torch.no_grad():
        report = cb.explain(model, images=double(2, 4, 8, 8))
    assert (report.folded, report.saved_bytes_before) == (1, None)


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = pair(), pair(nn.Conv2d(8, 8, 3))

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def sizes_compiled(model, x):
    """What a user's own torch.compile finds: the sizes of each graph's inputs."""
    found = []

    def backend(gm, inputs):
        found.extend(size for value in inputs for size in (value.shape if isinstance(value, torch.Tensor) else [value]))
        return gm

    torch.compile(model, backend=backend)(x)
    return found


def test_other_sizes_are_not_dynamic_nor_remembered(monkeypatch):
    def static(gm, inputs, *args, **kwargs):
        assert not any(isinstance(size, torch.SymInt) for value in inputs for size in (value, *value.shape))
        graphs.append(gm)
        return lower(gm, inputs, *args, **kwargs)

    lower, graphs = explain.lower, []
    monkeypatch.setattr(explain, "lower", static)
    model = Broken()
    compiled_once = sizes_compiled(model, double(2, 4, 9, 9))
    torch._dynamo.reset()
    with FEW if APART else contextlib.nullcontext():
        for size in range(10, 14 if APART else 13):  # more often than the recompile limit, which 2.11 counts them in
            cb.explain(model, double(size, 4, size, 9))
        assert len(graphs) >= 6
        assert sizes_compiled(model, double(2, 4, 9, 9)) == compiled_once
        assert any(isinstance(size, torch.SymInt) for size in sizes_compiled(model, double(3, 4, 9, 9)))
        cb.explain(model, double(4, 4, 9, 9))


def test_graph_breaks_are_summed():
    report = cb.explain(Broken(), double(2, 4, 9, 9))
    assert [item.module for item in report.rewrites] == ["first.1", "second.1"]


@pytest.mark.parametrize("lowering", ["aot_eager", "inductor"])
def test_one_info_line_per_graph_with_the_same_facts(lowering, caplog):
    model, x = randomise(Net(output_read_elsewhere).double()), double(2, 4, 6, 6)
    report = cb.explain(model, x)
    with caplog.at_level(logging.INFO, "convbn_compile"), pytest.warns(UserWarning, match="folded no batch norm"):
        compiled(model, lowering=lowering)(x)
    lines = [record.getMessage() for record in caplog.records if record.name == "convbn_compile"]
    assert lines == [f"tune: {report.summary()}"]
    assert "1 left alone: the convolution's output is also read by" in lines[0]
    assert "saved for backward" in lines[0]


@pytest.mark.parametrize("info", [False, True])
def test_counting_bytes_does_not_specialise_dynamic_shapes(info, caplog):
    model, x = pair(), double(4, 4, 8, 8)
    torch._dynamo.mark_dynamic(x, 0)
    caplog.set_level(logging.INFO if info else logging.WARNING, "convbn_compile")
    tuned = torch.compile(model, backend="convbn_tune", options={"lowering": "aot_eager"})
    with counted() as counts:
        tuned(x)
        tuned(double(7, 4, 8, 8))
    assert counts.graphs == 1
    assert cb.explain(model, x).saved_bytes_before > 0

"""bench: who runs when, figures that are right, a contender that fails is a line, JSON and back, plots, the command."""

import importlib
import json
import os
import re
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from support import randomise
from torch import nn
from torch._dynamo.utils import counters

import convbn_compile as cb
from convbn_compile import _bench_plot, _contest, cli, measure
from convbn_compile.benchmark import Benchmark, Row
from convbn_compile.contenders import ALL, NAMES, Checkpointed, Contender, checkpointed, contender, contenders, fused
from convbn_compile.measure import saved_for_backward
from convbn_compile.options import Lowering

bench = importlib.import_module("convbn_compile.bench").bench
MIB = 2**20
X = torch.zeros(2, 3, 12, 12)


def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


def net():
    return randomise(nn.Sequential(block(3, 8), nn.Sequential(block(8, 8), block(8, 8))))


class Fake(nn.Module):
    """Writes its name down, and takes so many seconds of a clock that nobody else turns, more in each round."""

    def __init__(self, name, world, seconds):
        super().__init__()
        self.name, self.world, self.seconds = name, world, seconds
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        self.world["ran"].append(self.name)
        rounds = len(self.world["ran"])
        if self.name == self.world.get("dies") and rounds > 30:
            raise MemoryError("no more")
        self.world["clock"] += self.seconds * (1 + rounds // 3)
        return x * self.weight


def fakes(world):
    """Three contenders, of which each takes twice as long as the one before."""
    return [
        Contender(name, name.upper(), lambda _, name=name, seconds=2.0**power: Fake(name, world, seconds))
        for power, name in enumerate(("one", "two", "four"))
    ]


@pytest.fixture
def world(monkeypatch):
    """What fakes write to; its clock is the benchmark's."""
    found = {"ran": [], "clock": 0.0}
    monkeypatch.setattr(measure.time, "perf_counter", lambda: found["clock"])
    return found


def test_each_on_its_own_then_all_in_turn_and_none_always_behind_the_same(world):
    found = bench(nn.Identity(), X, contenders=fakes(world), steps=6, reference="two", lowering="aot_eager")
    ran = world["ran"]
    timed = [ran[at : at + 3] for at in range(len(ran) - 18, len(ran), 3)]
    assert timed[:3] == [["four", "one", "two"], ["one", "two", "four"], ["two", "four", "one"]]
    assert timed[3:] == timed[:3]
    alone = ran[: ran.index("two")]
    assert len(alone) > 3
    assert alone == ["one"] * len(alone)
    assert "one" not in ran[len(alone) : 3 * len(alone)]
    assert [len(row.seconds) for row in found.rows] == [6, 6, 6]


def test_ratios_are_of_the_same_round(world):
    """Later steps take longer: medians of a machine that slows down say little, pairs are exact but within a round."""
    found = bench(nn.Identity(), X, contenders=fakes(world)[:2], steps=5, reference="one", lowering="aot_eager")
    one, two = found.rows
    assert (one.ratio, one.label, one.cold_seconds, one.kernels) == (1.0, "ONE", None, None)
    assert two.ratio == pytest.approx(2, rel=0.1)
    assert max(one.seconds) > 1.3 * min(one.seconds)
    assert one.spread > 0


def test_one_that_fails_on_the_way_is_a_line_and_costs_no_other_its_steps(world):
    world["dies"] = "two"
    found = bench(nn.Identity(), X, contenders=fakes(world), steps=6, reference="two", lowering="aot_eager")
    assert [row.because for row in found.rows] == ["", "MemoryError: no more", ""]
    assert [len(row.seconds) for row in found.rows] == [6, 0, 6]
    assert [row.ratio for row in found.rows] == [None] * 3
    assert found.rows[1].saved_bytes is None
    assert str(found).splitlines()[-2:] == [
        "no ratio: the reference, TWO, could not run",
        "TWO could not run: MemoryError: no more",
    ]
    assert len([line for line in str(found).splitlines() if line.startswith(("ONE", "FOUR"))]) == 2


@pytest.fixture(scope="module")
def found():
    """A benchmark of a small network, without code generation."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    chosen = ["eager", "train", "inductor", "pytorch", "tune", "checkpoint", "memsave_torch"]
    return bench(net(), X, contenders=chosen, batches=[4], steps=2, lowering="aot_eager")


def test_figures_are_those_of_explain_and_of_eager(found):
    rows = {row.contender: row for row in found.rows}
    model, x = net(), torch.randn(4, 3, 12, 12)
    report = cb.explain(model, x)
    assert rows["inductor"].saved_bytes == report.saved_bytes_before
    assert rows["tune"].saved_bytes == report.saved_bytes_after < report.saved_bytes_before
    assert rows["eager"].saved_bytes == saved_for_backward(model, model, x)
    activation = 4 * 8 * 12 * 12 * 4
    assert rows["checkpoint"].saved_bytes == 2 * activation  # before and after the first ReLU
    assert {name: row.convolutions for name, row in rows.items() if not row.because} == {
        "eager": (3, 3), "train": (3, 3), "inductor": (3, 3), "tune": (3, 3), "checkpoint": (5, 3),
    }  # fmt: skip
    ran = [row for row in found.rows if not row.because]
    assert all(row.batch == 4 and row.size == 12 and len(row.seconds) == 2 and row.ratio > 0 for row in ran)
    assert all(0 <= row.peak_bytes < 200 * MIB for row in ran)
    assert [row.contender for row in ran if row.cold_seconds is not None] == ["inductor", "tune"]
    assert all(row.cold_seconds > 0 and row.warm_seconds > 0 for row in ran if row.cold_seconds is not None)
    assert all(row.kernels is None and row.reserved_bytes is None for row in ran)


def test_those_that_cannot_run_say_why(found):
    lines = str(found).splitlines()
    assert lines[-2].startswith(
        "PyTorch's pass could not run: NotImplementedError: PyTorch's pass is one of Inductor's"
    )
    assert lines[-1].startswith("memsave_torch could not run: ModuleNotFoundError: memsave_torch cannot be imported")
    assert lines[0].split("  ")[0] == "contender"
    assert "kernels" not in lines[0]
    assert "reserved" not in lines[0]


def test_json_and_back(found):
    data = json.loads(json.dumps(found.to_dict()))
    assert Benchmark.from_dict(data) == found
    assert {"date", "convbn_compile", "torch", "python", "platform", "device", "threads"} <= set(data["configuration"])
    assert data["configuration"]["lowering"] == "aot_eager"
    assert data["configuration"]["reference"] == "inductor"


def test_the_model_and_the_world_are_left_as_they_were(found):
    model, before = nn.Sequential(block(3, 4)).train(), dict(os.environ)
    random, kept = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    bench(model, X, contenders=["train", "deploy"], dtypes=["autocast-bfloat16"], steps=1, lowering="aot_eager")
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert dict(os.environ) == before


def test_deploy_is_forward_only_and_dtypes_are_those_that_were_asked_for():
    seen = []

    class Seen(nn.Conv2d):
        def forward(self, x):
            result = super().forward(x)
            seen.append((x.dtype, self.weight.dtype, result.dtype, torch.is_grad_enabled()))
            return result

    dtypes = ["float64", "bfloat16", "autocast-bfloat16"]
    chosen = [Contender("forward", "forward", backward=False)]
    found = bench(Seen(3, 4, 1), X, contenders=chosen, dtypes=dtypes, sizes=[5], steps=1, lowering="aot_eager")
    low = torch.bfloat16
    wanted = [(torch.float64,) * 3, (low,) * 3, (torch.float32, torch.float32, low)]
    assert list(dict.fromkeys(seen)) == [(*dtypes, False) for dtypes in wanted]
    assert [(row.size, row.dtype) for row in found.rows] == [(5, dtype) for dtype in dtypes]
    assert all(row.saved_bytes is None and row.ratio is None and row.seconds for row in found.rows)
    assert not contender("deploy").backward


def test_cold_misses_the_caches_and_warm_hits_them():
    """With code generation: kernels are counted, and what compiles at first comes from the disk then."""
    counters.clear()
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).requires_grad_(False)
    model[1].weight.requires_grad_()
    [row] = bench(model, torch.zeros(1, 2, 3, 3), contenders=["inductor"], steps=1).rows
    assert not row.because
    assert row.kernels >= 2
    assert row.convolutions == (1, 0)
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1
    assert counters["inductor"]["fxgraph_cache_hit"] >= 2
    assert row.warm_seconds < row.cold_seconds


def test_peak_of_the_process():
    def step():
        held = torch.ones(64 * MIB // 4)
        time.sleep(0.05)
        del held

    assert 63 * MIB <= measure._rise_of_process(step) <= 70 * MIB
    assert measure._rise_of_process(lambda: None) < 4 * MIB


def test_peak_of_the_process_where_it_can_only_be_watched(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "CLEAR_REFS", tmp_path / "no" / "such")
    test_peak_of_the_process()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contenders": ["tuned"]}, "Unknown contender 'tuned'. Did you mean 'tune'? Known: eager, train, inductor"),
        ({"contenders": ["eager@0.5"]}, "inductor and tune also with a memory budget, such as tune@0.5."),
        ({"contenders": ["tune@2"]}, "memory_budget must be a number in (0, 1], or 'pointwise'"),
        ({"contenders": ["tune", "tune"]}, "contenders: 'tune' is there twice. Leave one out, got ['tune', 'tune']"),
        ({"contenders": ["tune", Contender("tune", "mine")]}, "contenders: 'tune' is there twice."),
        ({"contenders": []}, 'contenders: there is none. Give ["inductor", "tune"], or leave the argument out; got []'),
        ({"reference": "deploy"}, "reference must be one of the contenders that train, eager; got 'deploy'."),
        ({"dtypes": ["float32", "int8"]}, "dtypes[1]: Unknown dtype 'int8'. Known: float32, bfloat16"),
        ({"dtypes": ["autocast-float64"]}, "only, got 'autocast-float64'. Try autocast-bfloat16."),
        ({"dtypes": []}, "dtypes: there is none."),
        ({"dtypes": ["float32", "float32"]}, "dtypes: 'float32' is there twice."),
        ({"lowering": "fast"}, "Unknown lowering 'fast'."),
        ({"steps": 0}, "steps: an integer of 1 or more is needed, got 0 (int)."),
        ({"batches": [4, 0]}, "batches[1]: an integer of 1 or more is needed, got 0 (int)."),
        ({"sizes": [-1]}, "sizes[0]: an integer of 1 or more is needed, got -1 (int)."),
        ({"batches": [8, 4, 8]}, "batches: 8 is there twice. Leave one out, got [8, 4, 8] (list)."),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        bench(nn.Identity(), X, **{"contenders": ["eager"], **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": 8}, "batches: a list such as [8, 32] is needed, got 8 (int)."),
        ({"batches": "8"}, "batches: a list such as [8, 32] is needed, got '8' (str)."),
        ({"batches": ["8"]}, "batches[0]: an integer of 1 or more is needed, got '8' (str)."),
        ({"sizes": 8}, "sizes: a list such as [128, 224] is needed, got 8 (int)."),
        ({"sizes": [8, 2.5]}, "sizes[1]: an integer of 1 or more is needed, got 2.5 (float)."),
        ({"steps": 2.5}, "steps: an integer of 1 or more is needed, got 2.5 (float)."),
        ({"steps": True}, "steps: an integer of 1 or more is needed, got True (bool)."),
        ({"steps": None}, "steps: an integer of 1 or more is needed, got None (NoneType)."),
        ({"contenders": "tune"}, 'contenders: a list such as ["inductor", "tune"] is needed, got \'tune\' (str).'),
        ({"contenders": [3]}, "contenders[0]: a name such as 'tune', or a Contender, is needed, got 3 (int)."),
        ({"dtypes": "float32"}, 'dtypes: a list such as ["float32", "bfloat16"] is needed, got \'float32\' (str).'),
        ({"dtypes": [torch.float32]}, "dtypes[0]: a name such as 'float32' is needed, got torch.float32 (dtype)."),
        ({"kwargs": [3]}, "kwargs: a dict by the names of the model's arguments is needed, got [3] (list)."),
    ],
)
def test_what_has_the_wrong_type_is_said_before_anything_runs(arguments, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        bench(nn.Identity(), X, **{"contenders": ["eager"], **arguments})


def test_a_model_and_inputs_are_needed():
    with pytest.raises(TypeError, match="bench needs a torch.nn.Module, got 3"):
        bench(3, X)
    with pytest.raises(TypeError, match="bench needs what the model is called with, such as torch.zeros"):
        bench(nn.Identity())


@pytest.mark.parametrize("part", ["build", "compile", "forward"])
def test_one_that_wants_to_exit_is_a_line(part):
    def stop(*_):
        raise SystemExit("enough")

    stopping = nn.Conv2d(3, 3, 1)
    given = {"build": {"build": stop}, "compile": {"compile": stop}, "forward": {"build": lambda _: stopping}}
    if part == "forward":
        stopping.forward = stop
    chosen = [Contender("stops", "Stops", **given[part]), "eager"]
    stops, eager = bench(nn.Conv2d(3, 3, 1), X, contenders=chosen, steps=1, lowering="aot_eager").rows
    assert (stops.because, stops.seconds) == ("SystemExit: enough", ())
    assert len(eager.seconds) == 1


def test_who_interrupts_is_obeyed():
    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(nn.Conv2d(3, 3, 1), X, contenders=[Contender("one", "one", interrupted)], steps=1)


def test_the_table_says_what_ratios_are_to():
    ran = [Row(name, name.upper(), batch, 8, "float32", "", (1.0, 2.0), 1.0) for batch in (1, 2) for name in "ab"]

    def notes(rows):
        return str(Benchmark({"reference": "a"}, tuple(rows))).splitlines()[6:]

    assert notes(ran) == ["", "ratio: to A, pair by pair, median of 2 steps"]
    dead = Row("a", "A", 2, 8, "float32", "no more")
    assert notes([*ran[:2], dead, ran[3]])[-3:] == [
        "ratio: to A, pair by pair, median of 2 steps",
        "no ratio at batch 2, size 8, float32: the reference, A, could not run",
        "A could not run at batch 2, size 8, float32: no more",
    ]
    assert str(Benchmark({"reference": "a"}, (dead,))) == "A could not run: no more"
    inference = [replace(row, ratio=None) for row in ran]
    assert notes(inference) == []


def test_reference_is_inductor_or_the_first():
    chosen = [Contender(name, name) for name in ("one", "inductor")]
    run = partial(bench, nn.Conv2d(3, 3, 1), X, steps=1, lowering="aot_eager")
    assert run(contenders=chosen).configuration["reference"] == "inductor"
    assert run(contenders=chosen[:1]).configuration["reference"] == "one"


def test_everything_frozen_is_a_line():
    [row] = bench(nn.Conv2d(3, 3, 1).requires_grad_(False), X, contenders=["eager"], steps=1).rows
    assert row.because == ("ValueError: no output requires a gradient, so there is no backward: is everything frozen?")


def test_names_and_labels():
    assert contender("tune@0.5").label == "Tune, budget 0.5"
    assert {one.name for one in contenders(ALL)} == {*NAMES, "tune@0.99", "tune@0.5", "tune@0.25"}
    assert all(one.compile is None for one in contenders(NAMES, Lowering.AOT_EAGER) if "eager" in one.label)


def test_blocks_are_the_smallest_parts_with_two_norms():
    model = checkpointed(nn.Sequential(block(3, 8), nn.Sequential(block(8, 8), block(8, 8)), nn.BatchNorm2d(8)))
    assert [name for name, module in model.named_modules() if isinstance(module, Checkpointed)] == ["1"]
    assert isinstance(checkpointed(nn.Sequential(*block(3, 8), nn.BatchNorm2d(8))), Checkpointed)
    with pytest.raises(ValueError, match="no part of the model has two norms"):
        checkpointed(block(3, 8))


def test_what_goes_into_a_checkpoint_is_saved():
    model = checkpointed(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(block(8, 8), block(8, 8)))).eval()
    assert isinstance(model[1], Checkpointed)
    assert saved_for_backward(model, model, X) == 2 * 8 * 12 * 12 * 4


def test_the_network_of_a_contender_computes_what_the_model_does():
    model = net().double()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    wanted = model(x)
    assert torch.equal(checkpointed(randomised_like(model))(x), wanted)
    torch.testing.assert_close(fused(randomised_like(model))(x), wanted)


class WithActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Doubling(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_the_fused_network_keeps_activations_inside_of_norms():
    model = randomise(
        nn.Sequential(nn.Conv2d(3, 4, 3), WithActivation(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    ).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    wanted = model(x)
    torch.testing.assert_close(fused(model)(x), wanted)
    with pytest.raises(ValueError, match="a Doubling is not fused: it is no BatchNorm2d"):
        fused(nn.Sequential(nn.Conv2d(3, 4, 3), Doubling(4)).eval())


def test_a_reference_trains():
    with pytest.raises(ValueError, match="reference must be one of the contenders that train, tune; got 'deploy'"):
        bench(net(), torch.zeros(1, 3, 8, 8), contenders=["tune", "deploy"], reference="deploy")


def test_one_dtype_of_two_names():
    with pytest.raises(ValueError, match="dtypes: .* is there twice"):
        bench(net(), torch.zeros(1, 3, 8, 8), dtypes=["half", "float16"])


@pytest.mark.parametrize("biased", [False, True])
def test_the_fused_network_trains_what_the_model_does(biased):
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1, bias=biased), nn.BatchNorm2d(3)) for _ in range(4)))
    model = randomise(nn.Sequential(*model, nn.Linear(3, 3), nn.Linear(3, 3)))
    model[1].requires_grad_(False)
    model[2][0].requires_grad_(False)
    model[3][1].requires_grad_(False)
    model[4].requires_grad_(False)
    trained = [name for name, parameter in fused(model).named_parameters() if parameter.requires_grad]
    of_halves = ["3.0.weight", "3.0.bias"] if biased else ["2.0.bias", "3.0.weight"]
    assert trained == ["0.0.weight", "0.0.bias", *of_halves, "5.weight", "5.bias"]


def randomised_like(model):
    copied = net().double()
    copied.load_state_dict(model.state_dict())
    return copied


# --- plots and the command ---------------------------------------------------------------------------------------


def rows(batches=(1, 2), sizes=(8, 16), reserved=None):
    """Of two contenders, one of them also with a budget."""
    names = {"inductor": 4, "tune": 2, "tune@0.5": 1}
    return tuple(
        Row(
            name,
            name.upper(),
            batch,
            size,
            "float32",
            "",
            (0.001 * batch,),
            1.0,
            batch * size * share * MIB,
            3 * MIB,
            reserved,
        )
        for batch in batches
        for size in sizes
        for name, share in names.items()
    )


def drawn(monkeypatch, tmp_path, found):
    """The panels of a plot."""
    kept = []
    figures = importlib.import_module("matplotlib.figure")
    save = figures.Figure.savefig
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *a, **k: (kept.append(figure), save(figure, *a, **k)))
    _bench_plot.plot(Benchmark({}, found), tmp_path / "bench.png", title="net")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    return kept[0].axes


def test_plots_against_batch_size_and_resolution_and_each_other(monkeypatch, tmp_path):
    panels = drawn(monkeypatch, tmp_path, rows())
    assert [panel.get_xlabel() for panel in panels] == [
        "batch size", "batch size", "resolution", "resolution", "saved for backward, MiB",
    ]  # fmt: skip
    assert [panel.get_title() for panel in panels] == [
        "resolution 8", "resolution 8", "batch size 1", "batch size 1", "batch size 2, resolution 16",
    ]  # fmt: skip
    inductor, tune, _ = panels[0].get_lines()
    assert (list(inductor.get_xdata()), list(inductor.get_ydata())) == ([1, 2], [32, 64])
    assert list(tune.get_ydata()) == [16, 32]
    assert list(panels[1].get_lines()[0].get_ydata()) == [1, 2]
    front = panels[-1].get_lines()[-1]
    assert list(front.get_xdata()) == [32, 64]  # tune@0.5 and tune are joined


def test_the_last_panel_has_a_line_for_each_dtype(monkeypatch, tmp_path):
    wide = rows((1,), (8,))
    narrow = [replace(row, dtype="bfloat16", saved_bytes=row.saved_bytes // 2) for row in wide]
    [panel] = drawn(monkeypatch, tmp_path, (*wide, *narrow))
    fronts = [list(line.get_xdata()) for line in panel.get_lines() if line.get_linestyle() == "-"]
    assert fronts == [[32], [8, 16], [16], [4, 8]]


def test_plots_of_one_setting_and_of_a_gpu(monkeypatch, tmp_path):
    dead = Row("pytorch", "PyTorch's pass", 1, 8, "float32", "no such luck")
    [panel] = drawn(monkeypatch, tmp_path, (*rows((1,), (8,), reserved=5 * MIB), dead))
    assert panel.get_xlabel() == "peak memory, MiB"
    assert next(iter(panel.get_lines()[0].get_xdata())) == 3
    with pytest.raises(ValueError, match="nothing to plot: no contender ran"):
        _bench_plot.plot(Benchmark({}, (dead,)), tmp_path / "bench.png")


@pytest.fixture
def model(tmp_path):
    (tmp_path / "nets.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())\n"
    )
    return f"{tmp_path / 'nets.py'}:net"


FEW = ["--contenders", "eager", "train", "--steps", "2", "--lowering", "aot_eager"]


def test_the_command_prints_a_table_and_writes_files(model, tmp_path, capsys):
    files = ["--out", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "bench.svg")]
    arguments = ["bench", model, "--input", "1,3,8,8", "--batch", "2", "3", "--size", "8", *FEW, *files]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert [line.split()[:4] for line in out.splitlines()[2:4]] == [
        ["eager", "Eval", "2", "8"],
        ["eager", "Train", "2", "8"],
    ]
    assert out.splitlines()[-2:] == ["", "ratio: to eager Eval, pair by pair, median of 2 steps"]
    assert len(out.splitlines()) == 2 + 4 + 2
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["configuration"]["command"].startswith("convbn-compile bench ")
    assert data["configuration"]["command"].endswith("bench.svg")
    assert data["configuration"]["model"] == model
    assert str(Benchmark.from_dict(data)) + "\n" == out
    assert "<svg" in (tmp_path / "bench.svg").read_text()


def test_the_command_prints_json_and_nothing_else(model, capsys):
    threads = torch.get_num_threads()
    try:
        assert cli.main(["bench", model, "--input", "1,3,8,8", *FEW, "--threads", "1", "--json"]) == 0
    finally:
        torch.set_num_threads(threads)
    data = json.loads(capsys.readouterr().out)
    assert [row["contender"] for row in data["rows"]] == ["eager", "train"]
    assert data["configuration"]["threads"] == 1
    assert data["rows"][0]["saved_bytes"] == 2 * 4 * 6 * 6 * 4


def test_code_1_if_nothing_could_run(model, tmp_path, capsys):
    plot = ["--plot", str(tmp_path / "bench.png")]
    arguments = ["--contenders", "memsave_torch", "--lowering", "aot_eager", *plot]
    assert cli.main(["bench", model, "--input", "1,3,8,8", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("memsave_torch could not run: ModuleNotFoundError")
    assert "bench.png was not written: There is nothing to plot" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contenders", "tuned"], "argument --contenders: Unknown contender 'tuned'. Did you mean 'tune'?"),
        (["--contenders", "tune@0"], "memory_budget must be a number in (0, 1], or 'pointwise'"),
        (["--contenders", "tune", "tune"], "contenders: 'tune' is there twice."),
        (["--dtype", "float31"], "argument --dtype: Unknown dtype 'float31'."),
        (["--batch", "0"], "argument --batch: '0' is no number of 1 or more"),
        (
            ["--reference", "eager", "--contenders", "tune"],
            "reference must be one of the contenders that train, tune; got 'eager'.",
        ),
        (["--device", "abacus"], "argument --device: Expected one of cpu, cuda"),
        (["--out", "bench.txt"], "'bench.txt' does not end in .json"),
        (["--batch", "8", "8"], "batches: 8 is there twice."),
        (["--dtype", "autocast-float64"], "argument --dtype: torch.autocast casts to bfloat16 and float16 only"),
        (["--out", "no/such/bench.json"], "'no/such/bench.json': there is no folder no/such"),
        (["--all"], "unrecognized arguments: --all"),
    ],
)
def test_code_2_for_wrong_usage(model, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", model, "--input", "1,3,8,8", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def forbidden(monkeypatch):
    """Has nothing of a name be writable: the tests may run as root, who may write everywhere."""
    allowed = os.access
    return lambda path: monkeypatch.setattr(os, "access", lambda file, mode: file != path and allowed(file, mode))


@pytest.mark.parametrize("option", ["--out", "--plot"])
def test_files_that_cannot_be_written_are_found_before_anything_runs(option, model, tmp_path, forbidden, capsys):
    file = tmp_path / {"--out": "bench.json", "--plot": "bench.png"}[option]

    def told():
        with pytest.raises(SystemExit) as stopped:
            cli.main(["bench", f"{model}_is_not_there", "--input", "1,3,8,8", option, str(file)])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    forbidden(tmp_path)
    assert f"argument {option}: '{file}': the folder {tmp_path} must not be written to. Name a file" in told()
    file.touch()
    forbidden(file)
    assert f"argument {option}: '{file}': it must not be written to. Name a file" in told()
    file.unlink()
    file.mkdir()
    assert f"argument {option}: '{file}': it is a folder. Name a file" in told()


def test_what_was_measured_is_printed_though_a_file_cannot_be_written(model, tmp_path, monkeypatch, capsys):
    def measure(*arguments, plainly=cli._bench_command.measure):
        (tmp_path / "bench.json").mkdir()  # meanwhile
        return plainly(*arguments)

    monkeypatch.setattr(cli._bench_command, "measure", measure)
    files = ["--out", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "bench.svg")]
    assert cli.main(["bench", model, "--input", "1,3,8,8", *FEW, *files]) == 3
    out, err = capsys.readouterr()
    assert out.splitlines()[2].startswith("eager Eval")
    assert "bench.json was not written: [Errno 21] Is a directory" in err
    assert "<svg" in (tmp_path / "bench.svg").read_text()


def test_files_are_written_for_a_reader_that_has_seen_enough(model, tmp_path, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        out = tmp_path / "bench.json"
        assert cli.main(["bench", model, "--input", "1,3,8,8", *FEW, "--out", str(out)]) == 0
    assert len(json.loads(out.read_text())["rows"]) == 2


def test_code_130_if_interrupted(model, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure.Step, "peak", interrupted)
    try:
        code = cli.main(["bench", model, "--input", "1,3,8,8", *FEW])
    except KeyboardInterrupt:  # which would end the tests
        code = None
    assert code == 130
    assert capsys.readouterr() == ("", "convbn-compile: interrupted\n")


@pytest.mark.parametrize("package", ["psutil", "tqdm", "matplotlib"])
def test_a_missing_package_is_named_with_its_extra(package, model, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    arguments = ["bench", model, "--input", "1,3,8,8", *FEW, "--plot", str(tmp_path / "bench.png")]
    assert cli.main(arguments) == 3
    assert (
        f"This needs {package}, which is not installed: pip install 'convbn-compile[bench]'" in capsys.readouterr().err
    )


def test_the_bar_tells_what_is_done(monkeypatch):
    told = []
    monkeypatch.setattr(
        "convbn_compile.bench._tell", lambda bar, setting, what: told.append((bar.total, f"{setting}{what}"))
    )
    bench(nn.Conv2d(3, 3, 1), X, contenders=["eager"], batches=[1], steps=3, progress=True)
    assert len(told) == told[0][0] == 2 + _contest.WARMUPS + 3
    assert told[0][1] == "batch 1, float32, eager Eval: cold"

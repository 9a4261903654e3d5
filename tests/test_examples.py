"""The examples run as they stand, shortened by their own arguments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments):
    """What an example prints."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # beside another process more threads wait for each other
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


NAMES = sorted(file.name for file in EXAMPLES.glob("[!_]*.py"))
ALL_HELP = """
import contextlib, io, json, runpy, sys, traceback
sys.path[0], seen = {folder!r}, {{}}
for name in {names!r}:
    sys.argv, code = [name, "--help"], "did not stop"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_path({folder!r} + "/" + name, run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code
        except Exception:
            code = traceback.format_exc()
    seen[name] = code, out.getvalue()
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def helps(tmp_path_factory):
    """Exit code, or what went wrong, and output of each example for --help; one process, which imports torch once."""
    script = tmp_path_factory.mktemp("help") / "all_help.py"
    script.write_text(ALL_HELP.format(names=NAMES, folder=str(EXAMPLES)))
    return json.loads(run(script))


@pytest.mark.parametrize("name", NAMES)
def test_help(name, helps):
    code, printed = helps[name]
    assert code == 0, code
    assert printed.startswith(f"usage: {name}")


def test_saved_bytes(tmp_path):
    name, shape = "timm:test_resnet", ["--shape", 4, 3, 128, 128]
    assert "Tune" in run("saved_bytes.py", name, *shape, "--json", tmp_path / "saved.json")
    row = json.loads((tmp_path / "saved.json").read_text())["bytes"][name]
    assert row["Tune"] < row["fused network"] < row["Inductor Eval"]


def test_finetune(tmp_path):
    images = ["--train-images", 200, "--test-images", 100, "--batch-size", 4, "--image-size", 32]
    printed = run("finetune.py", "--steps", 3, "--lowering", "aot_eager", *images, "--out", tmp_path)
    assert "Tune" in printed
    assert {file.suffix for file in tmp_path.iterdir()} == {".png", ".json"}


def test_fold_cost():
    printed = run("fold_cost.py", "branches", "--shape", 1, 8, 8, 8, "--steps", 2, "--lowering", "aot_eager")
    assert 'fold="always"' in printed


def test_finetune_repvgg():
    arguments = ["--shape", 2, 3, 64, 64, "--steps", 2, "--lowering", "aot_eager", "--threads", 1]
    small = f"{Path(__file__).parent / 'test_reparameterisable.py'}:repvgg"
    lines = run("finetune_repvgg.py", small, *arguments).splitlines()
    (tune,) = (line.split() for line in lines if line.startswith("Tune, merged"))
    assert float(tune[-1]) <= 1e-10  # the largest difference of a gradient, in float64


def test_deploy_latency(tmp_path):
    name, arguments = "timm:test_resnet", ["--batch", 2, "--size", 64, "--calls", 2, "--lowering", "aot_eager"]
    assert "fused, Inductor" in run("deploy_latency.py", name, *arguments, "--json", tmp_path / "latency.json")
    row = json.loads((tmp_path / "latency.json").read_text())["latency"][f"{name}, batch 2"]
    assert row["Deploy"]["ms"] > row["check"]["ms"] > 0


def test_train_and_evaluate():
    """Logits of Deploy are eager's after every epoch of training in Tune mode."""
    lines = run("train_and_evaluate.py", "--lowering", "aot_eager").splitlines()
    rows = [line.split() for line in lines if line[0].isdigit()]
    assert len(rows) == 2
    assert all(deployed == eager and float(difference) <= 1e-5 for _, _, deployed, eager, difference, _ in rows)
    assert float(rows[0][2]) < float(rows[1][2])


def test_memory_budget(tmp_path):
    arguments = ["--shape", 1, 3, 64, 64, "--budgets", "pointwise", "--json", tmp_path / "budget.json"]
    assert "peak, Tune" in run("memory_budget.py", "timm:test_resnet", *arguments)
    row = json.loads((tmp_path / "budget.json").read_text())["bytes"]["pointwise"]
    assert 0 < row["tune"]["saved_bytes"] <= row["eval"]["saved_bytes"]


def test_dr2net(tmp_path):
    sizes = ["--steps", 2, "--batch-size", 2, "--test-images", 20, "--blocks", 3, "--depths", 3, 4]
    assert "Dr²Net" in run("dr2net.py", "--networks", "ResNet", *sizes, "--out", tmp_path)
    figures = json.loads((tmp_path / "dr2net.json").read_text())
    assert figures["ResNet-20"]["Dr²Net"]["saved MiB"] < figures["ResNet-20"]["full fine-tuning"]["saved MiB"]
    assert figures["stage 3, MiB"]["Dr²Net, end of schedule"][1] < figures["stage 3, MiB"]["Tune"][1]
    assert (tmp_path / "dr2net.png").exists()


def test_dtl(tmp_path):
    sizes = ["--steps", 2, "--batch-size", 4, "--image-size", 32, "--test-images", 100, "--networks", "--tasks"]
    assert "DTL+" in run("dtl.py", "--methods", "linear probe", "DTL+", *sizes, "--out", tmp_path)
    figures = json.loads((tmp_path / "dtl.json").read_text())
    assert figures["methods"]["linear probe"]["trained"] == 0 < figures["methods"]["DTL+"]["trained"]
    assert figures["frozen bottleneck"]["convbn_tune"] < 0.1 < figures["frozen bottleneck"]["eager"]
    assert (tmp_path / "dtl.png").exists()


def test_neuroflux(tmp_path):
    sizes = ["--networks", "tiny", "--epochs", 1, "--train-images", 100, "--test-images", 50]
    printed = run("neuroflux.py", *sizes, "--contenders", "NeuroFlux", "backprop", "--out", tmp_path)
    assert "batch size" in printed
    figures = json.loads((tmp_path / "neuroflux.json").read_text())["tiny"]
    assert all(report["row"]["peak MiB"] <= 8 for report in figures.values())
    assert all(unit["r2"] > 0.99 for unit in figures["NeuroFlux"]["profile"])
    assert {file.name for file in tmp_path.glob("*.png")} == {"neuroflux.png", "neuroflux_tiny_profile.png"}

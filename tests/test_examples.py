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


@pytest.mark.parametrize("name", sorted(file.name for file in EXAMPLES.glob("[!_]*.py")))
def test_help(name):
    assert "usage" in run(name, "--help")


def test_saved_bytes(tmp_path):
    printed = run("saved_bytes.py", "resnet18", "--shape", 4, 3, 128, 128, "--json", tmp_path / "saved.json")
    assert "Tune" in printed
    row = json.loads((tmp_path / "saved.json").read_text())["bytes"]["resnet18"]
    assert row["Tune"] == row["fused network"] < row["Inductor Eval"]


def test_finetune(tmp_path):
    arguments = ["--steps", 3, "--lowering", "aot_eager", "--train-images", 200, "--test-images", 100]
    printed = run("finetune.py", *arguments, "--out", tmp_path)
    assert "Tune" in printed
    assert {file.suffix for file in tmp_path.iterdir()} == {".png", ".json"}


def test_fold_cost():
    printed = run("fold_cost.py", "resnet18", "--shape", 1, 3, 32, 32, "--steps", 2, "--lowering", "aot_eager")
    assert 'fold="always"' in printed


def test_finetune_repvgg():
    arguments = ["--shape", 2, 3, 64, 64, "--steps", 2, "--lowering", "aot_eager", "--threads", 1]
    lines = run("finetune_repvgg.py", "repvgg_a0", *arguments).splitlines()
    rows = {name: line for line in lines for name in ("Inductor Eval", "Tune, merged") if line.startswith(name)}
    eval_loss, tune_loss = (float(row.split()[-2]) for row in rows.values())
    assert tune_loss == pytest.approx(eval_loss, rel=1e-3)

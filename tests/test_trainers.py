"""The examples of trainers train as the same trainer does without compiling, and fold every norm."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import counted, randomise
from torch import nn

import convbn_compile as cb

ROOT = Path(__file__).parents[1]
TUNED = ["--lowering", "aot_eager"]
EXAMPLES = {
    "accelerate": (3, TUNED, ["--no-compile"]),
    "lightning": (3, TUNED, ["--no-compile"]),
    "mmengine": (6, TUNED, ["--no-compile"]),  # its optimizer's count of steps has Dynamo compile the first step twice
    "timm": (3, ["--torchcompile", "convbn_tune"], []),
    "transformers": (6, TUNED, ["--no-compile"]),
    "ultralytics": (4, TUNED, ["--no-compile"]),
}


def installed(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def results(printed):
    """How many norms are folded of how many, the losses, and the accuracy, as an example prints them."""
    folded = [[int(number) for number in pair] for pair in re.findall(r"folded (\d+) of (\d+) norms", printed)]
    losses = [float(loss) for loss in re.search(r"^loss: (.*)$", printed, re.MULTILINE)[1].split()]
    return folded, losses, float(re.search(r"held-out digits: (\S+)", printed)[1])


TWICE = """
import runpy, sys
for arguments in {runs!r}:
    sys.argv = [{script!r}, *arguments]
    runpy.run_path({script!r}, run_name="__main__")
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)
    print("done")
"""


@pytest.mark.parametrize("trainer", [pytest.param(name, marks=installed(name)) for name in EXAMPLES])
def test_trains_as_uncompiled(trainer, tmp_path):
    norms, tuned, eager = EXAMPLES[trainer]
    script = {"timm": "train_with_timm_script.py"}.get(trainer, f"train_with_{trainer}.py")
    runs = [["--epochs", "1", *arguments] for arguments in (eager, tuned)]
    printed = python(TWICE.format(script=str(ROOT / "examples" / script), runs=runs), tmp_path)
    (none_folded, wanted, wanted_accuracy), (folded, losses, accuracy) = map(results, printed.split("done")[:2])
    assert not none_folded
    assert [sum(counts) for counts in zip(*folded, strict=True)] == [norms, norms]
    assert len(losses) == 5
    assert losses == pytest.approx(wanted, rel=2e-3)
    assert losses[-1] < losses[0]
    assert accuracy == pytest.approx(wanted_accuracy, abs=0.02)


OTHER_ROUTES = """
import copy
import torch
from _digits import SmallNet, digits, pretrained, print_what_is_folded
import convbn_compile as cb
from accelerate import Accelerator
print_what_is_folded()
images = digits()[0].tensors[0][:8]
net = pretrained(SmallNet, epochs=1)
routes = {
    "turn_on": lambda model: cb.turn_on(model, lowering="aot_eager"),
    "backend": lambda model: torch.compile(
        cb.freeze_batch_norm(model), backend="convbn_tune", options={"lowering": "aot_eager"}
    ),
}
for name, route in routes.items():
    torch.compiler.reset()
    model = Accelerator(mixed_precision="bf16").prepare(route(copy.deepcopy(net)))
    output = model.train()(images)
    output.sum().backward()
    print(name, output.dtype)
print("done")

from accelerate.utils import TorchDynamoPlugin
from transformers import Trainer, TrainingArguments
from torch import nn
for ask in (
    lambda: TorchDynamoPlugin(backend="convbn_tune"),
    lambda: Trainer(nn.Linear(1, 1), TrainingArguments(torch_compile_backend="convbn_tune")),
):
    try:
        ask()
    except ValueError as error:
        print(error)
"""


@installed("accelerate")
@installed("transformers")
def test_other_routes_through_accelerate_and_what_it_refuses(tmp_path):
    """turn_on, and torch.compile with our backend, before prepare(), under autocast; not our name.

    When the last fails they take it, and docs/integrations.md and the examples can say so.
    """
    routes, refusals = python(OTHER_ROUTES, tmp_path).split("done\n")
    told = [re.sub("; saved.*", "", line) for line in routes.splitlines()]
    folded = "convbn_compile: tune: folded 3 of 3 norms"
    assert told == [folded, "turn_on torch.float32", folded, "backend torch.float32"]
    refused = re.findall(r"'CONVBN_TUNE' is not a valid \w+", refusals)
    assert refused == ["'CONVBN_TUNE' is not a valid DynamoBackend"] * 2


def python(code, folder):
    """What a script prints that may import from examples."""
    script = folder / "script.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_frozen_by_lightning():
    """BaseFinetuning.freeze sets track_running_stats=False (2.6.6): batch statistics in training, until frozen."""
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[1].track_running_stats = False
    model.train()
    x = torch.randn(2, 3, 8, 8)
    assert cb.explain(model, x).folded == 0
    assert cb.explain(cb.freeze_batch_norm(model).train(), x).folded == 1


@installed("timm")
def test_frozen_by_timm():
    from timm.layers import ConvNormAct
    from timm.utils.model import freeze_batch_norm_2d

    model = freeze_batch_norm_2d(randomise(nn.Sequential(ConvNormAct(3, 4, 3), ConvNormAct(4, 4, 3)))).train()
    with counted() as counts:
        torch.compile(model, backend="convbn_tune", options={"lowering": "aot_eager"})(torch.randn(2, 3, 8, 8))
    assert (counts.graphs, counts.folded) == (1, 2)

"""DDP, FSDP2, SyncBatchNorm and checkpoints, in two processes on CPU: one launch for tests/distributed_checks.py."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")


def torchrun(script, *arguments):
    """What two processes print."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [*launcher, str(ROOT / script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes(tmp_path, subtests):
    torchrun("tests/distributed_checks.py", tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) > 20
    for name, errors in results.items():
        with subtests.test(msg=name):
            assert not any(errors), "\n".join(filter(None, errors))


def losses(*arguments):
    """What the example prints: the first line, and the loss after each epoch."""
    printed = torchrun("examples/distributed.py", "--lowering", "aot_eager", "--lr", "3e-3", *arguments)
    lines = re.findall(r"epoch (\d+): loss ([\d.]+)", printed)
    return printed.splitlines()[0], {int(epoch): float(loss) for epoch, loss in lines}


def test_the_example_resumes(tmp_path):
    """From a checkpoint of DDP with FSDP2: the loss is that of DDP without a stop."""
    facts, wanted = losses("--strategy", "ddp", "--epochs", 2, "--checkpoints", tmp_path)
    assert facts.startswith("ddp, 2 processes: folded 3 of 3 norms")
    shutil.rmtree(tmp_path / "epoch_0002")
    facts, found = losses("--strategy", "fsdp2", "--epochs", 2, "--checkpoints", tmp_path, "--resume")
    assert facts.startswith("fsdp2, 2 processes: folded 3 of 3 norms")
    assert list(wanted) == [1, 2]
    assert found == pytest.approx({2: wanted[2]}, rel=1e-3)

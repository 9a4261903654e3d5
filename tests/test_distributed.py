"""DDP, FSDP2, SyncBatchNorm and checkpoints, in two processes on CPU: one launch for tests/distributed_checks.py."""

import json
import os
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
    assert len(results) > 21
    for name, errors in results.items():
        with subtests.test(msg=name):
            assert not any(errors), "\n".join(filter(None, errors))

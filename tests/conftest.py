"""The strict world of the tests: fresh Dynamo, no cached graphs, seeded, torchvision importable next to a CPU torch."""

import gc
import logging
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import torch._dynamo.config
import torch._dynamo.guards
import torch._functorch.config
import torch._inductor.config

from convbn_compile.backend import warn_once
from convbn_compile.models import declare_torchvision_operators

declare_torchvision_operators()
# What takes time and tests nothing: pytest listens to loggers that do not propagate, and for any listener torch writes
# every graph down; Python's 700 lets a tenth of the time go into looking for garbage, Dynamo looks after each compile,
# and flushes the processor's caches to measure how long guards take; g++ takes twice as long for kernels of vectors as
# for others (the fixture `vectorised` has them), and its usual linker for all symbols of PyTorch.
logging.getLogger("torch.__trace").propagate = True
gc.freeze()
gc.set_threshold(50_000, 10, 10)
torch._dynamo.config.run_gc_after_compile = False
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0
torch._inductor.config.cpp.simdlen = 1
if gold := shutil.which("ld.gold"):
    linker = tempfile.TemporaryDirectory()
    Path(linker.name, "ld").symlink_to(gold)
    os.environ["COMPILER_PATH"] = linker.name


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    warn_once.cache_clear()
    torch.manual_seed(0)
    uncached = torch._inductor.config.patch(fx_graph_cache=False, fx_graph_remote_cache=False)
    with uncached, torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


@pytest.fixture
def vectorised():
    """C++ kernels as users get them."""
    with torch._inductor.config.patch({"cpp.simdlen": None}):
        yield

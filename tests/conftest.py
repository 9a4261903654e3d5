"""The strict world of the tests: fresh Dynamo, no cached graphs, seeded, torchvision importable next to a CPU torch."""

import gc
import logging

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
# and flushes the processor's caches to measure how long guards take.
logging.getLogger("torch.__trace").propagate = True
gc.freeze()
gc.set_threshold(50_000, 10, 10)
torch._dynamo.config.run_gc_after_compile = False
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    warn_once.cache_clear()
    torch.manual_seed(0)
    uncached = torch._inductor.config.patch(fx_graph_cache=False, fx_graph_remote_cache=False)
    with uncached, torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()

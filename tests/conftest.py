"""The strict world of the tests: fresh Dynamo, no cached graphs, seeded, torchvision importable next to a CPU torch."""

import pytest
import torch
import torch._functorch.config
import torch._inductor.config

from convbn_compile.backend import warn_once
from convbn_compile.models import declare_torchvision_operators

declare_torchvision_operators()


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    warn_once.cache_clear()
    torch.manual_seed(0)
    uncached = torch._inductor.config.patch(fx_graph_cache=False, fx_graph_remote_cache=False)
    with uncached, torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()

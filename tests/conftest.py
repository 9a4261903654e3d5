"""The strict world of the tests: fresh Dynamo, no cached graphs, seeded, torchvision importable next to a CPU torch."""

import importlib.util

import pytest
import torch
import torch._functorch.config
import torch._inductor.config

if importlib.util.find_spec("torchvision") is not None and not hasattr(torch.ops.torchvision, "nms"):
    _LIBRARY = torch.library.Library("torchvision", "DEF")  # its wheel from the index is built for CUDA
    _LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    uncached = torch._inductor.config.patch(fx_graph_cache=False, fx_graph_remote_cache=False)
    with uncached, torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()

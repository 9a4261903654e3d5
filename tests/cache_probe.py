"""Compiles small networks and prints, as JSON, what the compile caches and the user saw of each: run by test_caches.

Of the plain network the C++ is compiled and run, too; of the others it is written only.
"""

import contextlib
import json
import logging
import sys
import warnings
from unittest import mock

import torch
from support import randomise
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.async_compile import AsyncCompile
from torch.utils.checkpoint import checkpoint

from convbn_compile.backend import warn_once


class Checkpointed(nn.Module):
    """Two models that differ in the body of a checkpoint only."""

    def __init__(self, conv, norm, relu, *, relu_first):
        super().__init__()
        self.body = nn.Sequential(conv, relu, norm) if relu_first else nn.Sequential(conv, norm, relu)

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


def probe(lines, *, train=False, checkpointed=None, **options):
    """What is seen of one compilation; nothing but the caches on disk is left of those before it."""
    torch.compiler.reset()
    counters.clear()
    warn_once.cache_clear()
    lines.clear()

    torch.manual_seed(0)
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))).train(train)
    if checkpointed is not None:
        model = Checkpointed(*model[:3], relu_first=checkpointed == "relu first")
    asked = train or checkpointed is not None or options
    not_compiled = mock.patch.object(AsyncCompile, "cpp_pybinding", return_value=lambda *_: None)
    with warnings.catch_warnings(record=True) as caught, not_compiled if asked else contextlib.nullcontext():
        warnings.simplefilter("always")
        compiled = torch.compile(model, backend="convbn_tune", options=options)
        compiled(torch.randn(2, 3, 8, 8)).sum().backward()

    return {
        "autograd hits": counters["aot_autograd"]["autograd_cache_hit"],
        "autograd misses": counters["aot_autograd"]["autograd_cache_miss"],
        "autograd bypasses": counters["aot_autograd"]["autograd_cache_bypass"],
        "graph hits": counters["inductor"]["fxgraph_cache_hit"],
        "graph misses": counters["inductor"]["fxgraph_cache_miss"],
        "graph bypasses": counters["inductor"]["fxgraph_cache_bypass"],
        "lines": list(lines),
        "warnings": [str(warning.message) for warning in caught if "convbn" in str(warning.message)],
    }


def main():
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("convbn_compile").addHandler(handler)
    logging.getLogger("convbn_compile").setLevel(logging.INFO)
    print(json.dumps([probe(lines, **asked) for asked in json.loads(sys.argv[1])]))


if __name__ == "__main__":
    main()

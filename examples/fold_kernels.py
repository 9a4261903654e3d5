"""How many kernels folding adds to the fused network's: chains of so many convolution, norm, ReLU, and torchvision's.

    python examples/fold_kernels.py 4 8 16 --json docs/benchmarks/fold_kernels_cpu_202611.json
    python examples/fold_kernels.py resnet50 --shape 8 3 224 224 --device cuda

Counted in the code that Inductor writes: calls of kernels in forward and in backward, and on a CPU, where one call runs
many loops, the loops too. Convolutions themselves are calls of a library and not counted. On a CPU the code is written
and counted only, not compiled. On CUDA also the time of a step, with and without CUDA graphs.
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._functorch.config
import torch._inductor.config
from saved_bytes import make, write
from tabulate import tabulate
from torch import Tensor, nn
from torch._inductor import metrics
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import run_and_get_code
from tqdm import tqdm

from convbn_compile.contenders import fused

KERNEL = re.compile(r"^\s*(?:cpp_\w+\(|triton_\w+\.run\()", re.MULTILINE)
SETTINGS: dict[str, dict[str, Any]] = {
    "Inductor Eval": {"mode": "eval"},
    "fused network": {"mode": "eval"},
    "Tune": {"mode": "tune"},
}
ON_CUDA = {"Tune, combo_kernels": {"mode": "tune", "combo_kernels": True}}


def chain(pairs: int, channels: int = 8) -> nn.Module:
    """So many times convolution, norm, ReLU."""
    layers = (
        (nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        for _ in range(pairs)
    )
    return nn.Sequential(*(layer for block in layers for layer in block)).eval()


def compiled(model: nn.Module, name: str, options: dict[str, Any]) -> Callable[..., Tensor]:
    """A copy of the model through the backend."""
    torch.compiler.reset()
    own = copy.deepcopy(model)
    return torch.compile(fused(own) if name == "fused network" else own, backend="convbn_tune", options=options)


def not_compiled(*_: Any, **__: Any) -> Callable[..., None]:
    """In place of a compiled C++ function: all is left as it is, but for integers, which are indices: all 0."""

    def zero_indices(*tensors: Any) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor) and not tensor.is_floating_point():
                tensor.zero_()

    return zero_indices


@mock.patch.object(AsyncCompile, "cpp_pybinding", not_compiled)
@torch._functorch.config.patch(enable_autograd_cache=False)  # what is loaded from a cache is not written
@torch._inductor.config.patch(fx_graph_cache=False)
def count(function: Callable[..., Tensor], x: Tensor) -> dict[str, int]:
    """Calls of kernels, and on a CPU loops, in forward and in backward; there the function is of no use afterwards."""
    metrics.reset()
    output, (forward,) = run_and_get_code(function, x)
    loops = metrics.generated_kernel_count
    _, (backward,) = run_and_get_code(output.sum().backward)
    calls = [len(KERNEL.findall(code[code.index("def call(") :])) for code in (forward, backward)]
    found = {"forward": calls[0], "backward": calls[1]}
    if x.device.type == "cpu":
        found |= {"loops forward": loops, "loops backward": metrics.generated_kernel_count - loops}
    return found


def milliseconds(function: Callable[..., Tensor], x: Tensor, steps: int) -> float:
    """Median of a step of forward and backward on CUDA."""
    times = []
    for step in range(steps + 10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function(x).sum().backward()
        end.record()
        torch.cuda.synchronize()
        if step >= 10:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(model: nn.Module, x: Tensor, steps: int) -> dict[str, dict[str, float]]:
    """Counts, and on CUDA times, by contender."""
    on_cuda = x.device.type == "cuda"
    rows: dict[str, dict[str, float]] = {}
    for name, options in tqdm((SETTINGS | ON_CUDA if on_cuda else SETTINGS).items(), leave=False):
        function = compiled(model, name, options)
        rows[name] = dict(count(function, x))
        if on_cuda:
            rows[name]["ms"] = milliseconds(function, x, steps)
            graphs = compiled(model, name, {**options, "triton.cudagraphs": True})
            rows[name]["ms, CUDA graphs"] = milliseconds(graphs, x, steps)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="number of pairs of a chain, or a network of torchvision")
    parser.add_argument("--shape", type=int, nargs=4, default=(2, 8, 12, 12), help="of the batch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path, help="write the figures and the configuration to this file")
    arguments = parser.parse_args()
    x = torch.randn(arguments.shape, device=arguments.device)
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for name in arguments.models:
        model = chain(int(name), x.shape[1]) if name.isdigit() else make(name)
        rows[name] = measure(model.to(arguments.device), x, arguments.steps)
        lines = [[contender, *row.values()] for contender, row in rows[name].items()]
        print(tabulate(lines, headers=[name, *rows[name]["Tune"]], floatfmt=".2f"))
    if arguments.json:
        write(arguments.json, {"kernels": rows}, shape=arguments.shape, device=arguments.device)


if __name__ == "__main__":
    main()

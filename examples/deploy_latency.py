"""How long a call takes for inference: eager, Inductor, fused by hand under Inductor, Deploy.

    python examples/deploy_latency.py resnet50 mobilenet_v3_large --batch 1 32
    python examples/deploy_latency.py resnet18 --batch 1 --size 64 --calls 5 --lowering aot_eager

Networks are torchvision's or timm's, with random weights. "fused" is torch.nn.utils.fusion, which later changes of
the weights do not reach; Deploy looks before each call whether a weight has changed ("check"). Calls in turn, so that
all meet the same machine; medians, and the median of the ratios to the fused network's call in the same turn.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from saved_bytes import make, write
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm, trange

from convbn_compile.contenders import fused
from convbn_compile.deploy import kept_of

REFERENCE = "fused, Inductor"


def contenders(model: nn.Module, lowering: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name to what is called with a batch of images."""

    def compiled(network: nn.Module, mode: str) -> Callable[[Tensor], Tensor]:
        made: Callable[[Tensor], Tensor] = torch.compile(
            network, backend="convbn_tune", options={"mode": mode, "lowering": lowering}
        )
        return made

    return {
        "eager": model,
        "Inductor": compiled(copy.deepcopy(model), "eval"),
        REFERENCE: compiled(fused(copy.deepcopy(model)), "eval"),
        "Deploy": compiled(model, "deploy"),
    }


def check_seconds(model: nn.Module) -> float:
    """How long it takes to find that no weight has changed."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    kept = [(folded, [tensors[number] for number in key]) for _, key, folded in kept_of(model)]
    start, repeats = time.perf_counter(), 200
    for _ in range(repeats):
        assert all(folded.is_of(sources) for folded, sources in kept)
    return (time.perf_counter() - start) / repeats


def compare(model: nn.Module, shape: tuple[int, ...], lowering: str, calls: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a call and its ratio to the fused network's, for each contender."""
    x = torch.randn(shape)
    torch.compiler.reset()
    functions = contenders(model, lowering)
    for _ in trange(3, desc="compile", leave=False):
        outputs = {name: function(x) for name, function in functions.items()}
    for name, output in outputs.items():
        torch.testing.assert_close(output, outputs["eager"], rtol=1e-3, atol=1e-3, msg=f"{name} differs from eager")
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in trange(calls, desc="calls", leave=False):
        for name, function in functions.items():
            start = time.perf_counter()
            function(x)
            seconds[name].append(time.perf_counter() - start)
    found = {}
    for name, times in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(times, seconds[REFERENCE], strict=True)]
        found[name] = {"ms": 1e3 * statistics.median(times), "ratio": statistics.median(ratios)}
    found["check"] = {"ms": 1e3 * check_seconds(model)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="resnet50 of torchvision, or timm:repvgg_a0")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--size", type=int, default=224, help="of the images")
    parser.add_argument("--calls", type=int, default=31)
    parser.add_argument("--lowering", choices=("aot_eager", "inductor"), default="inductor")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the figures and the configuration to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(mode=False)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name in tqdm(arguments.models):
        torch.manual_seed(0)
        model = make(name)
        for batch in arguments.batch:
            shape = (batch, 3, arguments.size, arguments.size)
            results[f"{name}, batch {batch}"] = compare(model, shape, arguments.lowering, arguments.calls)
    rows = [
        [name, *(f"{cell['ms']:.2f}" + (f" ({cell['ratio']:.3f})" if "ratio" in cell else "") for cell in row.values())]
        for name, row in results.items()
    ]
    print(tabulate(rows, headers=["ms (of fused)", *next(iter(results.values()))], disable_numparse=True))
    if arguments.json:
        settings = {name: getattr(arguments, name) for name in ("threads", "size", "calls", "lowering")}
        write(arguments.json, {"latency": results}, **settings)


if __name__ == "__main__":
    main()

"""What the joint pass costs of a cold compile, and for each pair: CPU time.

    python examples/compile_time.py resnet50 --json docs/benchmarks/compile_time_cpu_202611.json
    python examples/compile_time.py resnet50 resnet101 resnet152 --shape 2 3 64 64 --lowering aot_eager

Networks are torchvision's, with random weights and batch norm on running statistics. A compile is the first step of
forward and backward, with empty caches and, so that all of it is counted, without worker processes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from saved_bytes import make, write
from tabulate import tabulate
from tqdm import tqdm

from convbn_compile import joint_pass


@dataclass
class Cost:
    """Seconds of CPU time, of a C++ compiler's too, but for `wall`."""

    pairs: int = 0
    joint_pass: float = 0.0
    compile: float = 0.0
    wall: float = 0.0

    @property
    def row(self) -> list[str]:
        """Pairs, the pass, all, the share, and for each pair."""
        share, per_pair = self.joint_pass / self.compile, self.joint_pass / max(self.pairs, 1)
        return [
            f"{self.pairs}",
            f"{self.joint_pass:.2f}",
            f"{self.compile:.1f}",
            f"{100 * share:.1f} %",
            f"{1e3 * per_pair:.0f}",
        ]


@contextlib.contextmanager
def timed_pass(cost: Cost) -> Iterator[None]:
    """Enter what the joint pass does inside."""
    run = joint_pass.run

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        report = run(*args, **kwargs)
        cost.joint_pass += time.process_time() - start
        cost.pairs += report.folded
        return report

    joint_pass.run = timed
    try:
        yield
    finally:
        joint_pass.run = run


def measure(name: str, shape: tuple[int, ...], lowering: str) -> Cost:
    """The cost of a network's first step."""
    torch.compiler.reset()
    cost, model, x = Cost(), make(name), torch.randn(shape)
    options: dict[str, Any] = {"lowering": lowering, "fold": "always"}
    if lowering == "inductor":
        options["compile_threads"] = 1
    with timed_pass(cost):
        wall, start = time.perf_counter(), sum(os.times()[:4])
        torch.compile(model, backend="convbn_tune", options=options)(x).sum().backward()
        cost.compile, cost.wall = sum(os.times()[:4]) - start, time.perf_counter() - wall
    return cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="resnet18 of torchvision, or timm:repvgg_a0")
    parser.add_argument("--shape", type=int, nargs=4, default=(2, 3, 128, 128), help="of the batch")
    parser.add_argument("--lowering", choices=("aot_eager", "inductor"), default="inductor")
    parser.add_argument("--json", type=Path, help="write the seconds and the configuration to this file")
    arguments = parser.parse_args()
    shape = tuple(arguments.shape)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        measure("resnet18", (1, 3, 32, 32), "aot_eager")  # what torch does once in a process
        costs = {name: measure(name, shape, arguments.lowering) for name in tqdm(arguments.models)}
    headers = ["", "pairs", "joint pass, s", "compile, s", "share", "for a pair, ms"]
    print(tabulate([[name, *cost.row] for name, cost in costs.items()], headers=headers, disable_numparse=True))
    if arguments.json:
        seconds = {name: asdict(cost) for name, cost in costs.items()}
        write(arguments.json, {"seconds": seconds}, shape=shape, lowering=arguments.lowering)


if __name__ == "__main__":
    main()

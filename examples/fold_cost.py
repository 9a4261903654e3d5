"""What folding costs in step time, with the cost rule and without: fold="auto", fold="always", no folds.

    python examples/fold_cost.py mobilenet_v2 --shape 16 3 96 96 --frozen norms
    python examples/fold_cost.py resnet18 --shape 1 3 64 64
    python examples/fold_cost.py branches --shape 1 256 4 4

Steps of forward and backward in turn, so that all meet the same machine; medians, as ratios to no folds. Networks are
torchvision's, with random weights and batch norm on running statistics, or three blocks of parallel branches.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import trange

from convbn_compile.models import declare_torchvision_operators

CONTENDERS = {
    "no folds": {"mode": "eval"},
    'fold="auto"': {"fold": "auto"},
    'fold="always"': {"fold": "always"},
}


class Branches(nn.Module):
    """RepVGG's block: 3x3, 1x1 and the input itself, each with its norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, size, padding=size // 2, bias=False), nn.BatchNorm2d(channels))
            for size in (3, 1)
        )
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Tensors [N, channels, H, W], both."""
        return (self.norm(x) + sum(convolution(x) for convolution in self.convolutions)).relu()


def freeze(model: nn.Module, frozen: str) -> nn.Module:
    """Freeze the norms' scales and shifts, or the convolutions' weights."""
    kinds = {"nothing": (), "norms": nn.BatchNorm2d, "convolutions": nn.Conv2d}[frozen]
    for module in model.modules():
        if isinstance(module, kinds):
            module.requires_grad_(requires_grad=False)
    return model


def compiled(model: nn.Module, x: Tensor, options: dict[str, str]) -> Callable[..., Tensor]:
    """A copy of the model after its first step, which compiles."""
    torch.compiler.reset()
    function = torch.compile(copy.deepcopy(model), backend="convbn_tune", options=options)
    function(x).sum().backward()
    return function


def medians(functions: dict[str, Callable[..., Tensor]], x: Tensor, steps: int) -> dict[str, float]:
    """Seconds of a step."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in trange(steps, leave=False):
        for name, function in functions.items():
            start = time.perf_counter()
            function(x).sum().backward()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[steps // 10 :]) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name of a torchvision classification model, or branches")
    parser.add_argument("--shape", type=int, nargs=4, default=(8, 3, 128, 128), help="of the batch")
    parser.add_argument("--frozen", choices=("nothing", "norms", "convolutions"), default="nothing")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lowering", choices=("aot_eager", "inductor"), default="inductor")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    declare_torchvision_operators()
    import torchvision

    torch.manual_seed(0)
    x = torch.randn(arguments.shape)
    if arguments.model == "branches":
        model: nn.Module = nn.Sequential(*(Branches(x.shape[1]) for _ in range(3)))
    else:
        model = torchvision.models.get_model(arguments.model, weights=None)
    model = freeze(model.eval(), arguments.frozen)
    functions = {
        name: compiled(model, x, {**options, "lowering": arguments.lowering}) for name, options in CONTENDERS.items()
    }
    seconds = medians(functions, x, arguments.steps)
    rows = [[name, f"{1e3 * time:.1f}", f"{time / seconds['no folds']:.2f}"] for name, time in seconds.items()]
    print(tabulate(rows, headers=["", "step, ms", "ratio"], disable_numparse=True))


if __name__ == "__main__":
    main()

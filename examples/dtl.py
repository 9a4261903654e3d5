"""Adapt a frozen network by a side network: DTL and DTL+ beside linear probing, BN-only, LoRA and full fine-tuning.

    pip install 'convbn-compile[demo]' timm peft
    python examples/dtl.py

EfficientNet-Lite0 with its ImageNet weights learns MNIST. A table has for each method what it trains, what is saved for
backward, a step's time and the accuracy. Three more tables need no data: what a frozen bottleneck of ResNet-50 saves in
eager mode, by Inductor and by convbn_tune; the bytes that ViT-B and ResNet-50 save by the first block that is adapted,
counted without running them; and images in a second where several tasks share one backbone. All batch norms are on
running statistics. Without peft the line of LoRA says so. A plot and a JSON file go to examples/out.
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from finetune import Digits, accuracy, batch_indices, load_digits, load_model
from matplotlib.figure import Figure
from saved_bytes import write
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm

import convbn_compile
from convbn_compile.measure import saved_for_backward
from convbn_compile.models import declare_torchvision_operators
from convbn_compile.side_tuning import attach, share_backbone

declare_torchvision_operators()

import timm  # noqa: E402  needs the operators

STAGES = [
    ["_blocks.2"],
    ["_blocks.4"],
    ["_blocks.6", "_blocks.7"],
    ["_blocks.9", "_blocks.10"],
    ["_blocks.12", "_blocks.13", "_blocks.14"],
]
"""The blocks of EfficientNet-Lite0 that keep the shape of their input."""

POINTWISE = r".*_(expand|project)_conv"
"""What LoRA adapts: the other convolutions of this network have a padding of their own, which peft does not know."""

Parameters = Iterable[nn.Parameter]
Start = Callable[[nn.Module], Parameters]
"""What a method does to the model, in place; returns what it trains beside the head."""


def frozen(model: nn.Module) -> nn.Module:
    """With nothing to train but the head."""
    convbn_compile.freeze_batch_norm(model).requires_grad_(requires_grad=False)
    model._fc.requires_grad_()
    return model


def linear_probe(model: nn.Module) -> Parameters:
    frozen(model)
    return []


def batch_norm_only(model: nn.Module) -> Parameters:
    norms = [module for module in frozen(model).modules() if isinstance(module, nn.BatchNorm2d)]
    return [parameter.requires_grad_() for norm in norms for parameter in norm.parameters()]


def lora(model: nn.Module) -> Parameters:
    import peft

    frozen(model)
    pointwise = [path for path, _ in model.named_modules() if re.fullmatch(POINTWISE, path)]
    for path in pointwise:  # peft makes convolutions of the same class, which this network's does not let it
        conv = model.get_submodule(path)
        plain = nn.Conv2d(conv.in_channels, conv.out_channels, 1, bias=False)
        plain.weight = conv.weight
        model.set_submodule(path, plain)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=2, target_modules=pointwise), model)
    model.requires_grad_(requires_grad=False)
    model._fc.requires_grad_()
    return [one.requires_grad_() for name, one in model.named_parameters() if "lora_" in name]


def full(model: nn.Module) -> Parameters:
    convbn_compile.freeze_batch_norm(model)
    return [parameter for name, parameter in model.named_parameters() if not name.startswith("_fc.")]


def dtl(model: nn.Module, *, plus: bool = False) -> Parameters:
    return attach(model, rank=4, start=2, plus=plus, kernel_size=3, blocks=STAGES, head="_fc").side_network.parameters()


def dtl_plus(model: nn.Module) -> Parameters:
    return dtl(model, plus=True)


METHODS: dict[str, tuple[Start, float, bool]] = {
    "linear probe": (linear_probe, 0.0, False),
    "BN only": (batch_norm_only, 3e-3, False),
    "LoRA": (lora, 3e-3, False),
    "full, Eval": (full, 3e-4, False),
    "full, Tune": (full, 3e-4, True),
    "DTL": (dtl, 1e-2, False),
    "DTL, convbn_tune": (dtl, 1e-2, True),
    "DTL+": (dtl_plus, 1e-2, False),
    "DTL+, convbn_tune": (dtl_plus, 1e-2, True),
}
"""What each does, its learning rate, and whether it is compiled."""


def train(name: str, model: nn.Module, digits: tuple[Digits, Digits], args: argparse.Namespace) -> dict[str, Any]:
    """What a method comes to."""
    start, lr, compiled = METHODS[name]
    adapted = list(start(model))
    if compiled:
        convbn_compile.turn_on(model, lowering=args.lowering)
    optimizer = torch.optim.AdamW([{"params": model._fc.parameters(), "lr": 3e-3}, {"params": adapted}], lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.steps)
    seconds = []
    model.train()
    for indices in batch_indices(digits[0], args):
        images, labels = digits[0].batch(indices, args.image_size)
        began = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
        seconds.append(time.perf_counter() - began)
    saved = saved_for_backward(lambda x, y: F.cross_entropy(model(x), y), model, images, labels)
    with tqdm(disable=True) as quiet:
        right = accuracy(model, digits[1], args.image_size, quiet)
    return {
        "trained": sum(parameter.numel() for parameter in adapted),
        "saved MiB": saved / 2**20,
        "step ms": 1000 * statistics.median(seconds[1:] or seconds),
        "accuracy": right,
    }


def methods(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The table of all that can run."""
    digits, rows = load_digits(4000, args.test_images, args.seed), {}
    pretrained = load_model(args.image_size)
    for name in tqdm(args.methods, desc="EfficientNet-Lite0"):
        try:
            rows[name] = train(name, copy.deepcopy(pretrained), digits, args)
        except ModuleNotFoundError as error:
            rows[name] = {"trained": f"needs {error.name}: pip install {error.name}"}
    return rows


def frozen_bottleneck(lowering: str) -> dict[str, float]:
    """What a bottleneck with nothing to train saves, in units of its input, whose gradient is wanted."""
    block = timm.create_model("resnet50").layer3[1].requires_grad_(requires_grad=False).eval()
    x = torch.randn(8, 1024, 14, 14, requires_grad=True)
    name = {"inductor": "inductor", "aot_eager": "aot_eager_decomp_partition"}[lowering]
    contenders = {
        "eager": block,
        "Inductor": torch.compile(block, backend=name),
        "convbn_tune": torch.compile(block, backend="convbn_tune", options={"lowering": lowering}),
    }
    return {
        name: saved_for_backward(function, block, x) / (x.numel() * x.element_size())
        for name, function in contenders.items()
    }


def saved_by_start(name: str, starts: Sequence[int], batch: int) -> dict[str, float]:
    """MiB that convbn_tune saves for full fine-tuning, and for DTL by the first block that is adapted."""
    example = torch.empty(batch, 3, 224, 224, device="meta")
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    found = {"full": convbn_compile.estimate_memory(model, example).saved_bytes / 2**20}
    for start in tqdm(starts, desc=name):
        handle = attach(model, rank=4, start=start)
        found[f"M = {start}"] = convbn_compile.estimate_memory(model, example).saved_bytes / 2**20
        handle.detach()
    return found


@torch.no_grad()
def throughput(tasks: Sequence[int], batch: int, calls: int) -> dict[str, float]:
    """Images in a second of ViT-S where so many tasks share a backbone, over those of so many models in turn."""
    found = {}
    for number in tqdm(tasks, desc="tasks"):
        models = [timm.create_model("vit_small_patch16_224", num_classes=10).eval() for _ in range(number)]
        for model in models[1:]:
            model.load_state_dict(models[0].state_dict())
        shared, x = share_backbone([attach(model) for model in models]), torch.randn(batch, 3, 224, 224)
        ratios = []
        for _ in range(calls):
            began = time.perf_counter()
            for model in models:
                model(x)
            half = time.perf_counter()
            shared(x)
            ratios.append((half - began) / (time.perf_counter() - half))
        found[f"{number} tasks"] = statistics.median(ratios)
    return found


def plot(rows: dict[str, dict[str, Any]], by_start: dict[str, dict[str, float]], path: Path) -> None:
    """Accuracy against saved bytes, and saved bytes by the first block that is adapted."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, row in rows.items():
        if "accuracy" in row:
            left.scatter(row["saved MiB"], row["accuracy"], color="tab:blue" if "DTL" in name else "gray")
            left.annotate(name, (row["saved MiB"], row["accuracy"]), xytext=(4, 3), textcoords="offset points")
    left.set(xlabel="MiB saved for backward", ylabel="accuracy", title="EfficientNet-Lite0 on MNIST")
    for name, found in by_start.items():
        shares = [saved / found["full"] for saved in found.values()]
        right.plot(list(found), shares, marker="o", label=name)
    right.set(ylabel="share of full fine-tuning", title="saved for backward, convbn_tune", ylim=(0, None))
    if by_start:
        right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), help="to train")
    parser.add_argument("--steps", type=int, default=150, help="training steps of each")
    parser.add_argument("--batch-size", type=int, default=32, help="images per step")
    parser.add_argument("--image-size", type=int, default=64, help="pixels that the digits are enlarged to")
    parser.add_argument("--test-images", type=int, default=1000, help="held-out images")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the batches")
    parser.add_argument("--networks", nargs="*", default=["vit_base_patch16_224", "resnet50"], help="to count bytes of")
    parser.add_argument("--starts", nargs="+", type=int, default=[0, 3, 6, 9, 11], help="first blocks that are adapted")
    parser.add_argument("--tasks", nargs="*", type=int, default=[2, 4], help="numbers of tasks that share a backbone")
    parser.add_argument(
        "--lowering", choices=("inductor", "aot_eager"), default="aot_eager", help="of what is compiled"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder of the plot and JSON")
    return parser.parse_args()


def main() -> None:
    """Train all, print the tables, write the plot and the figures."""
    args = parse_args()
    rows = methods(args)
    print(tabulate([{"method": name, **row} for name, row in rows.items()], headers="keys", floatfmt=".3f"))
    bottleneck = frozen_bottleneck(args.lowering)
    print(tabulate([bottleneck], headers="keys", floatfmt=".2f", showindex=["frozen bottleneck, units of its input"]))
    by_start = {name: saved_by_start(name, args.starts, batch=32) for name in args.networks}
    shared = throughput(args.tasks, batch=16, calls=7)
    if by_start:
        print(tabulate([{"saved MiB": name, **row} for name, row in by_start.items()], headers="keys", floatfmt=".0f"))
    if shared:
        print(tabulate([shared], headers="keys", floatfmt=".2f", showindex=["throughput, shared over separate"]))
    args.out.mkdir(parents=True, exist_ok=True)
    plot(rows, by_start, args.out / "dtl.png")
    figures = {"methods": rows, "frozen bottleneck": bottleneck, "saved MiB": by_start, "throughput": shared}
    write(args.out / "dtl.json", figures, **{**vars(args), "out": str(args.out)})
    print(f"Written: {args.out / 'dtl.png'}, {args.out / 'dtl.json'}")


if __name__ == "__main__":
    main()

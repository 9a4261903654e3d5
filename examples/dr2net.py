"""Fine-tune in memory that does not grow with depth: Dr²Net beside full fine-tuning, Tune and checkpoints.

    pip install 'convbn-compile[demo]'
    python examples/dr2net.py

Two networks learn MNIST: the EfficientNet-Lite0 of examples/finetune.py with its ImageNet weights, and a deep ResNet
with random ones. Of EfficientNet's sixteen blocks seven are in runs of one shape, of two and three, and those late ones
are small: little can be saved there, and it is here since no larger network's weights can be had without a download.
Dr²Net's blocks, and what is outside of its chains, are in Tune mode, too. A table for each network has what is saved
for backward, a step's time, the gradient error at the start and at the end of the schedule, and the accuracy; a plot
has the bytes that stage 3 of ResNet-50, 101 and 152 saves. Both go to examples/out, after some minutes. All batch norms
are on running statistics; graphs run without code generation unless --lowering says so.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from finetune import Digits, accuracy, adamw, batch_indices, load_digits, load_model
from matplotlib.figure import Figure
from saved_bytes import write
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm

import convbn_compile
from convbn_compile.contenders import contender
from convbn_compile.measure import saved_for_backward
from convbn_compile.models import declare_torchvision_operators
from convbn_compile.reversible import CoefficientSchedule, Reversible, make_reversible

declare_torchvision_operators()

import torchvision  # noqa: E402  needs the operators
from torchvision.models.resnet import Bottleneck  # noqa: E402

PRETRAINED, DEEP = "EfficientNet-Lite0", "ResNet"
EFFICIENTNET_CHAINS = [
    ["_blocks.6", "_blocks.7"],
    ["_blocks.9", "_blocks.10"],
    ["_blocks.12", "_blocks.13", "_blocks.14"],
]
DEPTHS = (6, 23, 36)
"""Blocks of stage 3 of ResNet-50, 101 and 152."""

Start = Callable[[nn.Module], tuple[nn.Module, Reversible | None]]


@dataclass(frozen=True)
class Network:
    """A network, the chains it has, and how it is trained."""

    name: str
    model: nn.Module
    chains: list[list[str]] | None = None
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = lambda model: torch.optim.AdamW(model.parameters(), 1e-3)


def networks(image_size: int, blocks: int) -> dict[str, Network]:
    """The pretrained one, and the deep one with so many blocks in stage 3."""
    torch.manual_seed(0)
    lite = load_model(image_size)
    lite._global_params = lite._global_params._replace(drop_connect_rate=None)
    deep = torchvision.models.ResNet(Bottleneck, [1, 1, blocks, 1], num_classes=10, width_per_group=16)
    return {
        PRETRAINED: Network(PRETRAINED, lite, EFFICIENTNET_CHAINS, lambda model: adamw(model, 1e-5)),
        DEEP: Network(f"ResNet-{2 + 3 * (3 + blocks)}", deep),
    }


@torch.no_grad()
def set_statistics(model: nn.Module, digits: Digits, args: argparse.Namespace) -> None:
    """Running statistics of a network with random weights, of which it has none yet."""
    model.train()
    for indices in batch_indices(digits, args)[:20]:
        model(digits.batch(indices, args.image_size)[0])


def contenders(network: Network, lowering: str) -> dict[str, Start]:
    """What each does to the model, in place."""

    def full(model: nn.Module) -> tuple[nn.Module, None]:
        return convbn_compile.freeze_batch_norm(model), None

    def tune(model: nn.Module) -> tuple[nn.Module, None]:
        return convbn_compile.turn_on(model, lowering=lowering), None

    def checkpoints(model: nn.Module) -> tuple[nn.Module, None]:
        return contender("checkpoint").build(convbn_compile.freeze_batch_norm(model)), None

    def reversible(model: nn.Module) -> tuple[nn.Module, Reversible]:
        handle = make_reversible(model, chains=network.chains)
        handle.compile(options={"lowering": lowering})
        return convbn_compile.turn_on(model, lowering=lowering), handle

    return {"full fine-tuning": full, "Tune": tune, "checkpoints": checkpoints, "Dr²Net": reversible}


def train(network: Network, start: Start, digits: tuple[Digits, Digits], args: argparse.Namespace) -> dict[str, Any]:
    """What a contender comes to."""
    model, handle = start(copy.deepcopy(network.model).train())
    optimizer = network.optimizer(model)
    schedule = handle and CoefficientSchedule(handle, args.steps)
    images, labels = digits[0].batch(batch_indices(digits[0], args)[0], args.image_size)
    saved = saved_for_backward(lambda x, y: F.cross_entropy(model(x), y), model, images, labels)
    errors, seconds = [handle.gradient_error(images)] if handle else [], []
    for indices in batch_indices(digits[0], args):
        images, labels = digits[0].batch(indices, args.image_size)
        began = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if schedule:
            schedule.step()
        seconds.append(time.perf_counter() - began)
    if handle:
        errors.append(handle.gradient_error(images))
    with tqdm(disable=True) as quiet:
        right = accuracy(model, digits[1], args.image_size, quiet)
    return {
        "saved MiB": saved / 2**20,
        "step ms": 1000 * statistics.median(seconds[1:] or seconds),
        "gradient error": " to ".join(f"{error:.0e}" for error in errors),
        "accuracy": right,
    }


def saved_by_depth(depths: Sequence[int], lowering: str) -> dict[str, list[float]]:
    """MiB that a ResNet's stage 3 of so many blocks saves for one image of 128 pixels, by contender."""
    x = torch.randn(1, 512, 16, 16)
    found: dict[str, list[float]] = {}
    for blocks in tqdm(depths, desc="stage 3"):
        stage = torchvision.models.ResNet(Bottleneck, [1, 1, blocks, 1]).layer3
        stage[0] = Bottleneck(512, 256, 2, stage[0].downsample)
        stage[0].downsample[0] = nn.Conv2d(512, 1024, 1, 2, bias=False)
        plain = Network("", stage)
        for name, start in contenders(plain, lowering).items():
            model, handle = start(copy.deepcopy(stage).eval())
            found.setdefault(name, []).append(saved_for_backward(model, model, x) / 2**20)
            if handle:
                handle.set(0.3, 0.7)
                found.setdefault("Dr²Net, end of schedule", []).append(saved_for_backward(model, model, x) / 2**20)
    return found


def plot(depths: Sequence[int], found: dict[str, list[float]], path: Path) -> None:
    """Saved bytes against depth."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, saved in found.items():
        axes.plot(depths, saved, marker="o", label=name)
    axes.set(
        xlabel="blocks of stage 3",
        ylabel="MiB saved for backward",
        title="stage 3 of ResNet-50, 101, 152",
        ylim=(0, None),
    )
    axes.set_xticks(depths)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--networks", nargs="*", choices=(PRETRAINED, DEEP), default=(PRETRAINED, DEEP), help="to train"
    )
    parser.add_argument("--blocks", type=int, default=12, help="of stage 3 of the deep ResNet; 12 make it a ResNet-47")
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS, help="blocks of stage 3, for the plot")
    parser.add_argument("--steps", type=int, default=40, help="training steps of each contender")
    parser.add_argument("--batch-size", type=int, default=16, help="images per step")
    parser.add_argument("--image-size", type=int, default=32, help="pixels that the digits are enlarged to")
    parser.add_argument("--test-images", type=int, default=300, help="held-out images")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the batches")
    parser.add_argument("--lowering", choices=("inductor", "aot_eager"), default="aot_eager", help="of Tune")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder of the plot and JSON")
    return parser.parse_args()


def main() -> None:
    """Train all, print the tables, write the plot and the figures."""
    args = parse_args()
    torch._dynamo.config.recompile_limit = 64  # a model that breaks at its chains is compiled block by block
    digits = load_digits(4000, args.test_images, args.seed)
    figures: dict[str, Any] = {}
    for chosen, network in networks(args.image_size, args.blocks).items():
        if chosen not in args.networks:
            continue
        if network.chains is None:
            set_statistics(network.model, digits[0], args)
        starts = contenders(network, args.lowering)
        rows = {name: train(network, start, digits, args) for name, start in tqdm(starts.items(), desc=network.name)}
        print(tabulate([{network.name: name, **row} for name, row in rows.items()], headers="keys", floatfmt=".3g"))
        print()
        figures[network.name] = rows
    figures["stage 3, MiB"] = by_depth = saved_by_depth(args.depths, args.lowering)
    print(
        tabulate(
            [[name, *saved] for name, saved in by_depth.items()],
            headers=("stage 3, MiB", *(f"{depth} blocks" for depth in args.depths)),
            floatfmt=".2f",
        )
    )
    args.out.mkdir(parents=True, exist_ok=True)
    plot(args.depths, by_depth, args.out / "dr2net.png")
    write(args.out / "dr2net.json", figures, **{**vars(args), "out": str(args.out)})
    print(f"Written: {args.out / 'dr2net.png'}, {args.out / 'dr2net.json'}")


if __name__ == "__main__":
    main()

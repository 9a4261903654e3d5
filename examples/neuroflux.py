"""Train from scratch inside a memory budget: NeuroFlux beside backprop, checkpoints and classic local learning.

    pip install 'convbn-compile[demo,local-learning]' torchvision
    python examples/neuroflux.py --networks vgg11 resnet18

VGG-11, VGG-16 and ResNet-18 for images of 32 pixels learn MNIST, 4000 images of it, each with the largest batch that
the budget allows, by the same optimizer, seeds and schedule. Backprop is local learning with the whole network as the
only unit, so that all are profiled, planned and measured alike; classic local learning has heads of 256 filters on the
whole map and one batch size for all units. A table has for each what fits, what it took, its accuracy and the time to
the accuracy that all reach; plots have bytes by batch size, and accuracy over time. Both go to examples/out, with JSON.

MNIST-5000 is what a package ships. The paper's CIFAR-10 would be a download, ten times the time, and 6.6 GB of disk for
the first cache of VGG-16 in float16.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from finetune import Digits, load_digits
from matplotlib.figure import Figure
from saved_bytes import write
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint_sequential
from torch.utils.data import TensorDataset

from convbn_compile.local_learning import NeuroFlux, Profile, Report
from convbn_compile.models import declare_torchvision_operators

declare_torchvision_operators()

import torchvision  # noqa: E402  needs the operators

SIZE, CLASSES, MIB = 32, 10, 2**20


def vgg(build: Callable[..., Any], channels: int = 512) -> nn.Module:
    """For images of 32 pixels."""
    model = build(num_classes=CLASSES)
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, CLASSES)
    return model


def tiny(**arguments: Any) -> nn.Module:
    return torchvision.models.VGG(torchvision.models.vgg.make_layers([16, "M", 32, "M"], batch_norm=True), **arguments)


def resnet18() -> nn.Module:
    """With the stem for images of 32 pixels."""
    model = torchvision.models.resnet18(num_classes=CLASSES)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg11": partial(vgg, torchvision.models.vgg11_bn),
    "vgg16": partial(vgg, torchvision.models.vgg16_bn),
    "resnet18": resnet18,
    "tiny": partial(vgg, tiny, 32),
}
"""The last is for a first try."""


def parts(model: Any) -> tuple[nn.Sequential, nn.Module]:
    """What comes before the classifier, one after the other, and the classifier."""
    if isinstance(model, torchvision.models.VGG):
        starts = [index for index, layer in enumerate(model.features) if isinstance(layer, nn.Conv2d)]
        layers = [model.features[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]
        return nn.Sequential(*layers), nn.Sequential(model.avgpool, nn.Flatten(), model.classifier)
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
    return nn.Sequential(stem, *blocks), nn.Sequential(model.avgpool, nn.Flatten(), model.fc)


class Checkpointed(nn.Module):
    """A sequence of which only about every third output is kept for backward, and the rest computed again."""

    def __init__(self, modules: nn.Sequential) -> None:
        super().__init__()
        self.inside = modules

    def forward(self, x: Tensor) -> Tensor:
        """What the sequence computes."""
        segments = max(2, len(self.inside) // 3)
        return checkpoint_sequential(self.inside, segments, x, use_reentrant=False)


def whole(model: nn.Module) -> list[nn.Module]:
    """As the only unit."""
    return list(parts(model))


def checkpointed(model: nn.Module) -> list[nn.Module]:
    features, classifier = parts(model)
    return [Checkpointed(features), classifier]


CONTENDERS: dict[str, tuple[Callable[[nn.Module], Any], dict[str, Any]]] = {
    "NeuroFlux": (lambda model: model, {}),
    "classic local learning": (lambda model: model, {"head_filters": 256, "similarity": 1e9}),
    "backprop": (whole, {}),
    "backprop, checkpoints": (checkpointed, {}),
}
"""What each makes of the model, and its arguments."""


def images(digits: Digits) -> TensorDataset:
    """With three channels, enlarged to 32 pixels."""
    enlarged = F.interpolate((digits.images - 127) / 128, size=SIZE, mode="bilinear", align_corners=False)
    return TensorDataset(enlarged.repeat(1, 3, 1, 1), digits.labels)


def train(network: str, contender: str, args: argparse.Namespace) -> tuple[Profile, Report | str]:
    """The profile of a contender, and what it comes to, or why it does not fit."""
    train, test = map(images, load_digits(args.train_images, args.test_images, args.seed))
    change, arguments = CONTENDERS[contender]
    torch.manual_seed(args.seed)
    model = change(NETWORKS[network]())
    shared = {
        "seed": args.seed,
        "batch_size_limit": args.batch_size_limit,
        "optimizer": partial(sgd, lr=args.lr),
        "options": {"lowering": args.lowering},
    }
    with tempfile.TemporaryDirectory() as folder:
        flux = NeuroFlux(model, CLASSES, args.budget[network], folder, **shared, **arguments)
        profile = flux.profile(train[:2][0])
        try:
            plan = flux.plan()
            if contender == "classic local learning":
                flux.batch_size_limit = min(block.batch_size for block in plan.blocks)
                plan = flux.plan()
        except ValueError as error:
            return profile, str(error)
        if contender == "NeuroFlux":
            print(f"{network}\n{profile}\n\n{plan}\n")
            args.out.mkdir(parents=True, exist_ok=True)
            profile.plot(args.out / f"neuroflux_{network}_profile.png")
        report = flux.fit(train, test, args.epochs)
    print(f"{network}, {contender}\n{report}\n")
    return profile, report


def sgd(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)


def row(found: Report | str, target: float) -> dict[str, Any]:
    """Of the table."""
    if isinstance(found, str):
        return {"batches": found}
    return {
        "batches": ", ".join(str(block.batch_size) for block in found.blocks),
        "peak MiB": found.peak / MIB,
        "seconds": found.seconds,
        "accuracy": max(each.accuracy for each in found.exits),
        f"s to {target:.3f}": found.seconds_to(target),
        "exit": found.chosen.name,
        "exit's accuracy": found.chosen.accuracy,
        "fewer parameters": found.parameters / found.chosen.parameters,
        "throughput": found.throughput,
    }


def plot(found: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """Accuracy over time, from the histories of the contenders for each network."""
    figure = Figure(figsize=(5 * len(found), 4), layout="constrained")
    for axes, (network, histories) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for name, history in histories.items():
            best = list(accumulate((max(each["accuracies"]) for each in history), max))
            seconds = [each["seconds"] for each in history]
            axes.step([0, *seconds], [0, *best], where="post", label=name)
        axes.set(xlabel="seconds", ylabel="best accuracy so far", title=network, ylim=(0.5, 1))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


BUDGETS = {"vgg11": "150MiB", "vgg16": "215MiB", "resnet18": "170MiB", "tiny": "8MiB"}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["vgg11", "resnet18"], help="to train")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="to compare")
    parser.add_argument("--budget", help="of memory, for every network, such as 200MiB; default: " + str(BUDGETS))
    parser.add_argument("--epochs", type=int, default=3, help="of each block")
    parser.add_argument("--batch-size-limit", type=int, default=128, help="the largest batch: 4000 images are few")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate for a batch of 128")
    parser.add_argument("--train-images", type=int, default=4000, help="images to train on")
    parser.add_argument("--test-images", type=int, default=1000, help="held-out images")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the networks and the batches")
    parser.add_argument(
        "--lowering", choices=("inductor", "aot_eager"), default="aot_eager", help="of what is compiled"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder of plots and JSON")
    args = parser.parse_args()
    args.budget = dict.fromkeys(NETWORKS, args.budget) if args.budget else BUDGETS
    return args


def main() -> None:
    """Train all, print the tables, write the plots and the figures."""
    args = parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("convbn_compile.local_learning").setLevel(logging.INFO)
    figures: dict[str, Any] = {}
    reports: dict[str, dict[str, Report]] = {}
    for network in args.networks:
        found = {contender: train(network, contender, args) for contender in args.contenders}
        reports[network] = {name: report for name, (_, report) in found.items() if isinstance(report, Report)}
        bests = [max(each.accuracy for each in report.exits) for report in reports[network].values()]
        rows = {name: row(report, min(bests, default=1.0)) for name, (_, report) in found.items()}
        print(tabulate([{network: name, **each} for name, each in rows.items()], headers="keys", floatfmt=".3f"), "\n")
        figures[network] = {
            name: {
                "row": rows[name],
                "profile": [asdict(unit) for unit in profile.units],
                "report": report.to_dict() if isinstance(report, Report) else report,
            }
            for name, (profile, report) in found.items()
        }
    args.out.mkdir(parents=True, exist_ok=True)
    histories = {network: {name: one.history for name, one in found.items()} for network, found in reports.items()}
    plot(histories, args.out / "neuroflux.png")
    write(args.out / "neuroflux.json", figures, **{**vars(args), "out": str(args.out)})
    print(f"Written: {args.out / 'neuroflux.png'}, {args.out / 'neuroflux.json'}")


if __name__ == "__main__":
    main()

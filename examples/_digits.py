"""What the examples of trainers share: scikit-learn's handwritten digits, a small network, arguments, and results.

The network is trained from scratch on the digits upside down, batch norm on batch statistics; the examples fine-tune it
on the digits as they are, batch norm on the running statistics that it has by then.

Data: 1797 images of 8x8 pixels from the UCI repository (Alpaydin, Kaynak), as shipped in scikit-learn, BSD-3-Clause.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

HELD_OUT = 300
BATCH = 64
SIZE = 16  # pixels that the digits are enlarged to
LR = 2e-3

with contextlib.suppress(ModuleNotFoundError):  # no torchvision: the trainers import it only where they find it
    from saved_bytes import declare_torchvision_operators

    declare_torchvision_operators()

Logits = Callable[[nn.Module, Tensor], Tensor]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line of an example."""
    parser = argparse.ArgumentParser(
        description=(description or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=2, help="epochs of 23 steps")
    return parser


def arguments(description: str | None) -> argparse.Namespace:
    """The command line of an example whose trainer compiles the network."""
    extended = parser(description)
    extended.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="in Tune mode")
    extended.add_argument(
        "--lowering", choices=("inductor", "aot_eager"), default="inductor", help="aot_eager generates no code"
    )
    return extended.parse_args()


@contextlib.contextmanager
def needs(packages: str) -> Iterator[None]:
    """Say what to install if a package is missing inside."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise SystemExit(f"This example needs {error.name}: pip install {packages}") from None


def print_what_is_folded() -> None:
    """Print convbn_compile's line about every graph that is compiled."""
    logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stdout)
    logging.getLogger("convbn_compile").setLevel(logging.INFO)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1497 digits to train on and 300 held out: images [N, 1, 16, 16] from -1 to 1 and labels [N]."""
    from sklearn.datasets import load_digits

    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    small = pixels.float().reshape(-1, 1, 8, 8) / 8 - 1
    images = F.interpolate(small, size=SIZE, mode="bilinear", align_corners=False)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:-HELD_OUT], order[-HELD_OUT:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def loader(data: Any, **options: Any) -> DataLoader[Any]:
    """Full batches in random order, the same in every run."""
    generator = torch.Generator().manual_seed(1)
    return DataLoader(data, BATCH, shuffle=True, drop_last=True, generator=generator, **options)


class SmallNet(nn.Sequential):
    """Three convolutions with batch norm: images [N, 1, 16, 16] to logits [N, 10]."""

    def __init__(self) -> None:
        blocks = [_block(1, 16, stride=1), _block(16, 32, stride=2), _block(32, 64, stride=2)]
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def pretrained(make: Callable[[], nn.Module], logits: Logits = nn.Module.__call__, epochs: int = 4) -> Any:
    """A network that was trained on the digits upside down, eagerly, in Train mode."""
    torch.manual_seed(0)
    model = make().train()
    batches = loader(digits()[0])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * len(batches))
    for _ in range(epochs):
        for images, labels in batches:
            F.cross_entropy(logits(model, images.flip(2)), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model


def print_results(losses: Sequence[float], model: nn.Module, logits: Logits = nn.Module.__call__) -> None:
    """Print the loss of every fifth step, and the share of held-out digits that the network gets right."""
    print("loss:", *(f"{loss:.4f}" for loss in losses[::5]))
    model.eval()
    images, labels = digits()[1].tensors
    device = next(model.parameters()).device
    with torch.no_grad():
        right = logits(model, images.to(device)).argmax(1).cpu() == labels
    print(f"accuracy on {len(labels)} held-out digits: {right.float().mean():.3f}")

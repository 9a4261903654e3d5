"""Train in Tune mode and evaluate in Deploy mode, in turn, on one model: weights are folded once for each evaluation.

    python examples/train_and_evaluate.py
    python examples/train_and_evaluate.py --epochs 3 --lowering aot_eager

A network that was trained on handwritten digits upside down is fine-tuned on them as they are. After every epoch it is
evaluated on held-out digits three times: deployed, eagerly, which must give the same, and deployed with averaged
weights (EMA) swapped in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from _digits import LR, SmallNet, arguments, digits, loader, pretrained
from tabulate import tabulate
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import convbn_compile


@contextlib.contextmanager
def swapped(model: nn.Module, other: nn.Module) -> Iterator[None]:
    """The other's parameters in the model inside."""

    def swap() -> None:
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.data, theirs.data = theirs.data, mine.data

    swap()
    try:
        yield
    finally:
        swap()


def accuracy(function: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
    """The share of held-out digits that are right, and the logits."""
    images, labels = digits()[1].tensors
    with torch.no_grad():
        logits = function(images)
    return (logits.argmax(1) == labels).float().mean().item(), logits


def train_one_epoch(
    tuned: Callable[[Tensor], Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, average: AveragedModel
) -> float:
    """The loss of the last step."""
    for images, labels in loader(digits()[0]):
        loss = nn.functional.cross_entropy(tuned(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    return loss.item()


def main() -> None:
    args = arguments(__doc__)
    model = convbn_compile.freeze_batch_norm(pretrained(SmallNet))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    tuned, deployed = model, model
    if args.compile:
        tuned, deployed = (
            torch.compile(model, backend="convbn_tune", options={"mode": mode, "lowering": args.lowering})
            for mode in ("tune", "deploy")
        )
    rows = []
    for epoch in range(args.epochs):
        loss = train_one_epoch(tuned, model, optimizer, average)
        model.eval()
        right, logits = accuracy(deployed)
        eager, reference = accuracy(model)
        with swapped(model, average.module):
            averaged, _ = accuracy(deployed)
        difference = (logits - reference).abs().max() / reference.abs().max()
        rows.append([epoch, f"{loss:.4f}", f"{right:.3f}", f"{eager:.3f}", f"{difference:.0e}", f"{averaged:.3f}"])
        model.train()
    headers = ["epoch", "last loss", "Deploy", "eager", "logits differ by", "EMA, Deploy"]
    print(tabulate(rows, headers=headers, disable_numparse=True))


if __name__ == "__main__":
    main()

"""Fine-tune a ResNet of transformers with its Trainer, compiled by the Trainer's own option, in Tune mode.

    pip install 'convbn-compile[trainers]'
    python examples/train_with_transformers.py

The Trainer refuses torch_compile_backend="convbn_tune": the name goes to Accelerate, whose list of backends is closed.
So it is told to use Inductor, and train(), where it calls torch.compile, runs inside inductor_patched().
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from _digits import BATCH, LR, arguments, digits, needs, pretrained, print_results, print_what_is_folded
from torch import Tensor, nn

import convbn_compile


def small_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    shape = {"num_channels": 1, "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 10}
    task = "single_label_classification"  # found out in the first step, it would be compiled twice
    return ResNetForImageClassification(ResNetConfig(layer_type="basic", problem_type=task, **shape))


def logits(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).logits


def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}


def main() -> None:
    args = arguments(__doc__)
    from transformers import PrinterCallback, Trainer, TrainingArguments

    print_what_is_folded()
    model = convbn_compile.freeze_batch_norm(pretrained(small_resnet, logits))  # also when Trainer calls model.train()
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
        settings |= {"num_train_epochs": args.epochs, "learning_rate": LR, "per_device_train_batch_size": BATCH}
        training = TrainingArguments(
            folder, torch_compile=args.compile, logging_steps=1, dataloader_drop_last=True, **settings
        )
        trainer = Trainer(model, training, collate, train_dataset=digits()[0])
        trainer.remove_callback(PrinterCallback)
        with convbn_compile.inductor_patched(lowering=args.lowering):
            trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print_results(losses, model, logits)


if __name__ == "__main__":
    with needs("'convbn-compile[trainers]'"):
        main()

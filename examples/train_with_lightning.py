"""Fine-tune with Lightning, the LightningModule compiled in Tune mode.

    pip install 'convbn-compile[trainers]'
    python examples/train_with_lightning.py

Lightning has no option to compile: torch.compile is called on the LightningModule, and Trainer.fit takes what it
returns.
"""

from __future__ import annotations

import logging

import torch
from _digits import LR, SmallNet, arguments, digits, loader, needs, pretrained, print_results, print_what_is_folded
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

import convbn_compile


def main() -> None:
    args = arguments(__doc__)
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = convbn_compile.freeze_batch_norm(pretrained(SmallNet))
            self.losses: list[Tensor] = []

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            images, labels = batch
            return F.cross_entropy(self.net(images), labels)

        def on_train_batch_end(self, outputs: dict[str, Tensor], *_: object) -> None:
            self.losses.append(outputs["loss"])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=LR)

    print_what_is_folded()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Classifier()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=args.epochs, **quiet)
    compiled = torch.compile(module, backend="convbn_tune", options={"lowering": args.lowering})
    trainer.fit(compiled if args.compile else module, loader(digits()[0]))
    print_results([loss.item() for loss in module.losses], module.net)


if __name__ == "__main__":
    with needs("'convbn-compile[trainers]'"):
        main()

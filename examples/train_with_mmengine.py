"""Fine-tune with MMEngine's Runner, compiled by its own `compile` dict, in Tune mode.

    pip install 'convbn-compile[mmengine]'
    python examples/train_with_mmengine.py

cfg.compile is handed to torch.compile as it is: the backend is named there, with its options.
"""

from __future__ import annotations

import tempfile
from typing import Any

from _digits import LR, SmallNet, arguments, digits, loader, needs, pretrained, print_results, print_what_is_folded
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

import convbn_compile


def main() -> None:
    args = arguments(__doc__)
    from mmengine.hooks import Hook
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Classifier(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = convbn_compile.freeze_batch_norm(pretrained(SmallNet))

        def forward(self, images: Tensor, labels: Tensor, mode: str = "tensor") -> Tensor | dict[str, Tensor]:
            scores = self.net(images)
            return {"loss": F.cross_entropy(scores, labels)} if mode == "loss" else scores

    class Losses(Hook):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def after_train_iter(self, _: Runner, **step: Any) -> None:
            self.losses.append(step["outputs"]["loss"].item())

    print_what_is_folded()
    model, recorded = Classifier(), Losses()
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(
            model,
            work_dir=folder,
            train_dataloader=loader(digits()[0]),
            train_cfg={"by_epoch": True, "max_epochs": args.epochs},
            optim_wrapper={"optimizer": {"type": "Adam", "lr": LR}},
            custom_hooks=[recorded],
            default_hooks={"checkpoint": None, "logger": None},
            log_level="ERROR",
            cfg={
                "compile": {"backend": "convbn_tune", "options": {"lowering": args.lowering}} if args.compile else False
            },
        )
        runner.train()
    print_results(recorded.losses, model.net)


if __name__ == "__main__":
    with needs("'convbn-compile[mmengine]'"):
        main()

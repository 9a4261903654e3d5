"""Fine-tune with Ultralytics, which compiles with Inductor and nothing else, in Tune mode.

    pip install convbn-compile ultralytics scikit-learn tqdm
    python examples/train_with_ultralytics.py

Ultralytics, under the AGPL-3.0, is in none of our extras. Its train(compile=True) says backend="inductor", so it is
called inside inductor_patched(). It calls model.train() in each epoch and has no option that freezes batch norm, so a
callback does, after the network is built and compiled and before it runs. Its networks have SiLU, which keeps its own
input: Tune folds every norm of them and saves no memory.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from _digits import arguments, digits, needs, print_what_is_folded

import convbn_compile

NETWORK = {
    "nc": 10,
    "backbone": [[-1, 1, "Conv", [16, 3, 1]], [-1, 1, "Conv", [32, 3, 2]], [-1, 1, "Conv", [64, 3, 2]]],
    "head": [[-1, 1, "Classify", ["nc"]]],
}


def write_images(folder: Path) -> None:
    """The digits as Ultralytics wants them: folder/train/3/17.png."""
    from PIL import Image

    for split, data in zip(("train", "val"), digits(), strict=True):
        for index, (image, label) in enumerate(data):
            path = folder / split / str(label.item()) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(((image[0] + 1) * 127).byte().numpy()).save(path)


def freeze(trainer: Any) -> None:
    convbn_compile.freeze_batch_norm(getattr(trainer.model, "_orig_mod", trainer.model))


def main() -> None:
    args = arguments(__doc__)
    import yaml
    from ultralytics import YOLO

    print_what_is_folded()
    logging.getLogger("ultralytics").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder)
        (folder / "small-cls.yaml").write_text(yaml.safe_dump(NETWORK))
        settings = {"data": folder, "imgsz": 32, "batch": 64, "workers": 0, "plots": False, "verbose": False}
        settings |= {"project": folder, "optimizer": "Adam", "lr0": 2e-3, "warmup_epochs": 0, "val": False}
        settings |= {"auto_augment": None, "erasing": 0.0, "fliplr": 0.0, "scale": 0.0}  # digits stay as they are
        YOLO(folder / "small-cls.yaml").train(name="pretraining", epochs=2, **settings)

        model = YOLO(folder / "pretraining" / "weights" / "last.pt")
        losses: list[float] = []
        model.add_callback("on_pretrain_routine_end", freeze)
        model.add_callback("on_train_batch_end", lambda trainer: losses.append(trainer.loss.detach().item()))
        with convbn_compile.inductor_patched(lowering=args.lowering):
            model.train(name="finetuning", epochs=args.epochs, compile=args.compile, **settings)
        accuracy = model.val(data=folder, plots=False, verbose=False).top1
    print("loss:", *(f"{loss:.4f}" for loss in losses[::5]))
    print(f"accuracy on 300 held-out digits: {accuracy:.3f}")


if __name__ == "__main__":
    with needs("ultralytics scikit-learn tqdm"):
        main()

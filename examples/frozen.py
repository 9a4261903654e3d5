"""What a partly frozen network saves for backward, and what it costs to save masks as bits.

    python examples/frozen.py resnet50 --shape 8 3 128 128

The first convolution and its norm are trained, all else is frozen, so that backward goes through the frozen part, which
autograd and Inductor keep the inputs of. Networks are torchvision's, with random weights. The second table is one ReLU
under Inductor: forward that also keeps a mask, and backward that reads one, as the activation itself, as booleans, and
as bits.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from saved_bytes import make, write
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import trange

from convbn_compile.bench import bench
from convbn_compile.identities.bits_of_mask import pack, unpack

CONTENDERS = ("eager", "inductor", "tune")


def freeze_but_the_stem(model: nn.Module) -> nn.Module:
    """Leave the first convolution and the first norm trained."""
    model.requires_grad_(requires_grad=False)
    for kind in (nn.Conv2d, nn.BatchNorm2d):
        next(module for module in model.modules() if isinstance(module, kind)).requires_grad_()
    return model


Kept = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
FORMS: dict[str, Kept] = {
    "activation": (lambda z: z, lambda z: z <= 0),
    "booleans": (lambda z: z <= 0, lambda mask: mask),
    "bits": (lambda z: pack(z <= 0, axis=1), lambda bits: unpack(bits, axis=1)),
}
"""What forward keeps of a ReLU's output, and the mask that backward makes of it."""


def compiled(form: Kept) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    """A ReLU's forward and backward."""
    keep, mask = form

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        z = x.relu()
        return z, keep(z)

    def backward(kept: Tensor, gradient: Tensor) -> Tensor:
        return torch.where(mask(kept), 0, gradient)

    return torch.compile(forward, dynamic=False), torch.compile(backward, dynamic=False)


def masks(shape: tuple[int, ...], calls: int) -> dict[str, dict[str, float]]:
    """Bytes that each form of a mask takes, and milliseconds of forward and backward, medians of interleaved calls."""
    x, gradient = torch.randn(shape), torch.randn(shape)
    functions = {name: compiled(form) for name, form in FORMS.items()}
    kept = {name: forward(x)[1] for name, (forward, _) in functions.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in FORMS}
    for _ in trange(calls, leave=False):
        for name, (forward, backward) in functions.items():
            times[name].append((milliseconds(forward, x), milliseconds(backward, kept[name], gradient)))
    rows = {}
    for name, pairs in times.items():
        first, second = zip(*pairs[calls // 10 + 1 :], strict=True)
        medians = {"forward": statistics.median(first), "backward": statistics.median(second)}
        rows[name] = {"bytes": kept[name].untyped_storage().nbytes(), **medians}
    return rows


def milliseconds(function: Callable[..., object], *arguments: Tensor) -> float:
    start = time.perf_counter()
    function(*arguments)
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name of a torchvision classification model")
    parser.add_argument("--shape", type=int, nargs=4, default=(8, 3, 128, 128), help="of the batch")
    parser.add_argument("--relu", type=int, nargs=4, default=(8, 64, 56, 56), help="shape of the one activation")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--calls", type=int, default=50, help="of the one activation")
    parser.add_argument("--lowering", choices=("aot_eager", "inductor"), default="inductor", help="of the network")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the figures and the configuration to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = freeze_but_the_stem(make(arguments.model))
    images = torch.empty(*arguments.shape)
    found = bench(
        model, images, contenders=CONTENDERS, steps=arguments.steps, lowering=arguments.lowering, progress=True
    )
    print(found)
    forms = masks(tuple(arguments.relu), arguments.calls)
    rows = [[name, row["bytes"], f"{row['forward']:.2f}", f"{row['backward']:.2f}"] for name, row in forms.items()]
    print(
        "\n" + tabulate(rows, headers=["kept of a ReLU", "bytes", "forward, ms", "backward, ms"], disable_numparse=True)
    )
    if arguments.json:
        settings = {key: value for key, value in vars(arguments).items() if key != "json"}
        write(arguments.json, {"frozen": found.to_dict(), "relu": forms}, **settings)


if __name__ == "__main__":
    main()

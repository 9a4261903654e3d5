"""Fine-tune a re-parameterisable network: its parallel branches merge while it trains, with the gradients of all.

    python examples/finetune_repvgg.py mobileone_s0 --shape 4 3 128 128
    python examples/finetune_repvgg.py repvgg_a0 fastvit_t8 --lowering aot_eager
    python examples/finetune_repvgg.py my_models.py:small_repvgg

RepVGG, MobileOne, FastViT, RepViT and RepGhost train several convolutions side by side and add them up for inference
only. Merged, they train as the network that inference will have, one line away:

    model = torch.compile(model.eval(), backend="convbn_tune")

Four contenders are fine-tuned side by side: eager Eval, Inductor Eval, the merged network in Tune mode, and, as the
limit, timm's re-parameterised network, which has other parameters. A step is forward and backward, without the
optimizer's. The first layer is frozen: that is usual, and on CPUs it keeps torch 2.11 to 2.15 from a crash in the
gradient of a strided 1x1 convolution's weight, where its input is an image in channels_last. Networks are timm's, or
made of timm's blocks by a callable in a Python file, with random weights and the batch norm statistics of the batch.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm, trange

from convbn_compile.measure import saved_for_backward
from convbn_compile.models import declare_torchvision_operators, load_model

MIB = 2**20


def make(name: str, images: Tensor) -> nn.Module:
    """A network of timm, or of path.py:callable, with the running statistics of some images, its first layer frozen."""
    import timm

    model: nn.Module = load_model(name) if ".py:" in name else timm.create_model(name, num_classes=10)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(std=0.1)
        model.train()(images)
    next(model.children()).requires_grad_(requires_grad=False)
    return model.eval()


@dataclass
class Contender:
    """A network, what calls it, what trains it, and what was measured."""

    model: nn.Module
    function: Callable[..., Tensor]
    saved: int = 0
    loss: float = 0.0
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-2)

    def backward(self, x: Tensor, labels: Tensor) -> float:
        """Forward and backward; seconds."""
        self.optimizer.zero_grad()
        start = time.perf_counter()
        loss = nn.functional.cross_entropy(self.function(x), labels)
        loss.backward()
        self.loss = loss.item()
        return time.perf_counter() - start


def contenders(model: nn.Module, lowering: str) -> dict[str, Contender]:
    """Copies of one network, with the same parameters."""
    eager = copy.deepcopy(model)
    compiled = {"Inductor Eval": "eval", "Tune, merged": "tune"}
    return {"eager Eval": Contender(eager, eager)} | {
        name: compile_copy(model, mode, lowering) for name, mode in compiled.items()
    }


def compile_copy(model: nn.Module, mode: str, lowering: str) -> Contender:
    """A compiled copy."""
    model, options = copy.deepcopy(model), {"mode": mode, "lowering": lowering}
    return Contender(model, torch.compile(model, backend="convbn_tune", options=options))


def converted(model: nn.Module) -> nn.Module:
    """timm's re-parameterised network, the limit."""
    from timm.utils.model import reparameterize_model

    limit: nn.Module = reparameterize_model(copy.deepcopy(model)).eval().requires_grad_()
    next(limit.children()).requires_grad_(requires_grad=False)
    return limit


def gradient_differences(model: nn.Module, x: Tensor, labels: Tensor) -> list[str]:
    """Largest difference of a gradient from eager's, relative to the largest of its tensor's, in float64."""
    found = []
    for run in contenders(model.double(), "aot_eager").values():
        run.backward(x.double(), labels)
        found.append([parameter.grad for parameter in run.model.parameters() if parameter.grad is not None])
    pairs = [zip(gradients, found[0], strict=True) for gradients in found]
    errors = [[((mine - theirs).abs().max() / theirs.abs().max()).item() for mine, theirs in pair] for pair in pairs]
    return [f"{max(error):.0e}" for error in errors]


def compare(name: str, shape: tuple[int, ...], lowering: str, steps: int) -> list[list[str]]:
    """Fine-tune with each contender, a step each in turn; a row for each."""
    torch.manual_seed(0)
    x, labels = torch.randn(shape), torch.randint(10, (shape[0],))
    model = make(name, x)
    runs = contenders(model, lowering) | {"re-parameterised": compile_copy(converted(model), "eval", lowering)}
    for run in tqdm(runs.values(), desc=f"{name}: compile", leave=False):
        run.saved = saved_for_backward(run.function, run.model, x)
        run.backward(x, labels)
    differences = [*gradient_differences(model, x[:2], labels[:2]), "other parameters"]
    for _ in trange(steps, desc=f"{name}: steps", leave=False):
        for run in runs.values():
            run.seconds.append(run.backward(x, labels))
            nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            run.optimizer.step()
    medians = [statistics.median(run.seconds) for run in runs.values()]
    rows = []
    for (contender, run), median, differ in zip(runs.items(), medians, differences, strict=True):
        numbers = f"{1e3 * median:.0f}", f"{median / medians[-1]:.2f}", f"{run.saved / MIB:.1f}", f"{run.loss:.4f}"
        rows.append([contender, *numbers, differ])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["mobileone_s0"], help="of timm, or path.py:callable")
    parser.add_argument("--shape", type=int, nargs=4, default=(4, 3, 128, 128), help="of the batch")
    parser.add_argument("--lowering", choices=("aot_eager", "inductor"), default="inductor")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    declare_torchvision_operators()
    headers = ["", "step, ms", "of re-parameterised", "saved MiB", "last loss", "gradients differ by"]
    for name in arguments.models:
        rows = compare(name, tuple(arguments.shape), arguments.lowering, arguments.steps)
        print(f"\n{name}\n{tabulate(rows, headers=headers, disable_numparse=True)}")


if __name__ == "__main__":
    main()

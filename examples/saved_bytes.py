"""How many bytes a network saves for backward: eager, plain Inductor, PyTorch's own pass, Tune, and fused.

    python examples/saved_bytes.py resnet18 --shape 4 3 128 128
    python examples/saved_bytes.py resnet18 resnet50 efficientnet_b0 --lowering inductor --json saved.json
    python examples/saved_bytes.py timm:convnext_atto timm:repvgg_a0

Networks are torchvision's or timm's, with random weights and batch norm on running statistics. Counted is what autograd
keeps between forward and backward (torch.autograd.graph.saved_tensors_hooks), each storage once; parameters, buffers
and inputs are not counted, copies of them are.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from convbn_compile.models import declare_torchvision_operators

MIB = 2**20


def saved_for_backward(function: Callable[..., Tensor], model: nn.Module, *inputs: Tensor) -> int:
    """Bytes that one call of `function` keeps for backward, parameters, buffers and inputs of `model` not counted."""
    given = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), *inputs)}
    saved: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = 0 if storage.data_ptr() in given else storage.nbytes()
        kept.append(tensor)  # so that no storage is reused while we look
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(*inputs)
    del output
    return sum(saved.values())


def fused(model: nn.Module) -> nn.Module:
    """The network with neighbouring convolutions and norms fused by torch.nn.utils.fusion: the limit."""
    for parent in model.modules():
        last: tuple[str, nn.Conv2d] | None = None
        for name, module in parent.named_children():
            if isinstance(module, nn.BatchNorm2d) and last is not None:
                setattr(parent, last[0], fuse_conv_bn_eval(last[1], module))
                setattr(parent, name, nn.Identity())
            last = (name, module) if isinstance(module, nn.Conv2d) else None
    return model.requires_grad_()


def make(name: str) -> nn.Module:
    """A classification network of torchvision, or, if the name starts with timm:, of timm."""
    declare_torchvision_operators()
    library, _, rest = name.rpartition(":")
    if library == "timm":
        import timm

        made: nn.Module = timm.create_model(rest)
    else:
        import torchvision

        made = torchvision.models.get_model(name, weights=None)
    return made.eval()


def contenders(lowering: str) -> dict[str, Callable[[nn.Module], Callable[..., Tensor]]]:
    """Name to what makes a callable of a model."""

    def ours(mode: str) -> Callable[[nn.Module], Callable[..., Tensor]]:
        options: dict[str, Any] = {"mode": mode, "lowering": lowering}
        return lambda model: torch.compile(model, backend="convbn_tune", options=options)

    def pytorch(model: nn.Module) -> Callable[..., Tensor]:
        return torch.compile(model, options={"efficient_conv_bn_eval_fx_passes": True})

    chosen: dict[str, Callable[[nn.Module], Callable[..., Tensor]]] = {"eager Eval": lambda model: model}
    chosen |= {"Inductor Eval": ours("eval")}
    if lowering == "inductor":  # the pass needs Inductor
        chosen |= {"PyTorch's pass": pytorch}
    return chosen | {"Tune": ours("tune"), "fused network": lambda model: ours("eval")(fused(model))}


def measure(model: nn.Module, shape: tuple[int, ...], lowering: str = "aot_eager") -> dict[str, int]:
    """Bytes saved for backward by each contender, for one batch of random images.

    Args:
        model: in eval mode; fused in place by the last contender.
        shape: of the batch, such as (4, 3, 224, 224).
        lowering: "inductor", or "aot_eager" for the same graphs without code generation.
    """
    x, row = torch.randn(shape), {}
    for name, make in tqdm(contenders(lowering).items(), desc=type(model).__name__, leave=False):
        torch.compiler.reset()
        row[name] = saved_for_backward(make(model), model, x)
    return row


def write(file: Path, figures: dict[str, Any], **settings: Any) -> None:
    """Write figures as JSON, with the settings, the day, the version of torch and the platform."""
    where = {"date": date.today().isoformat(), "torch": torch.__version__, "platform": platform.platform()}
    file.write_text(json.dumps({"configuration": {**where, **settings}, **figures}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="resnet18 of torchvision, or timm:repvgg_a0")
    parser.add_argument("--shape", type=int, nargs=4, default=(4, 3, 224, 224), help="of the batch")
    parser.add_argument("--lowering", choices=("aot_eager", "inductor"), default="aot_eager")
    parser.add_argument("--json", type=Path, help="write the bytes and the configuration to this file")
    arguments = parser.parse_args()
    shape = tuple(arguments.shape)
    rows = {name: measure(make(name), shape, arguments.lowering) for name in arguments.models}
    table = [[name, *(f"{number / MIB:.2f}" for number in row.values())] for name, row in rows.items()]
    print(tabulate(table, headers=["saved, MiB", *next(iter(rows.values()))], disable_numparse=True))
    if arguments.json:
        write(arguments.json, {"bytes": rows}, shape=shape, lowering=arguments.lowering)


if __name__ == "__main__":
    main()

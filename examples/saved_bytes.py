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
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from convbn_compile.bench import machine
from convbn_compile.contenders import contenders
from convbn_compile.measure import saved_for_backward
from convbn_compile.models import declare_torchvision_operators
from convbn_compile.options import Lowering

MIB = 2**20


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


CONTENDERS = ("eager", "inductor", "pytorch", "tune", "fused")


def measure(model: nn.Module, shape: tuple[int, ...], lowering: str = "aot_eager") -> dict[str, int]:
    """Bytes saved for backward by each contender, for one batch of random images.

    Args:
        model: in eval mode; fused in place by the last contender.
        shape: of the batch, such as (4, 3, 224, 224).
        lowering: "inductor", or "aot_eager" for the same graphs without code generation.
    """
    x, row = torch.randn(shape), {}
    names = [name for name in CONTENDERS if name != "pytorch" or lowering == "inductor"]  # the pass needs Inductor
    for contender in tqdm(contenders(names, Lowering(lowering)), desc=type(model).__name__, leave=False):
        torch.compiler.reset()
        network = contender.build(model)
        function = contender.compile(network) if contender.compile else network
        row[contender.label] = saved_for_backward(function, network, x)
    return row


def write(file: Path, figures: dict[str, Any], **settings: Any) -> None:
    """Write figures as JSON, with the settings, the command, the day, versions and the machine."""
    script = Path(sys.argv[0])
    where = {
        **machine(torch.device("cpu")),
        "command": shlex.join(["python", f"examples/{script.name}", *sys.argv[1:]]),
    }
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

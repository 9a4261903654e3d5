"""How well estimate_memory foretells what a step saves for backward and needs at the peak: five networks, measured.

    python examples/estimate_accuracy.py
    python examples/estimate_accuracy.py resnet18 timm:convnext_atto --shape 2 3 64 64 --mode eval --json accuracy.json

Networks are torchvision's or timm's, with random weights and batch norm on running statistics. Measured is a real step
without code generation (lowering="aot_eager"): what autograd keeps (torch.autograd.graph.saved_tensors_hooks), and the
largest sum of the memory of tensors that live at one time, which a TorchDispatchMode sees.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from saved_bytes import MIB, make, write
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import convbn_compile
from convbn_compile.measure import saved_for_backward

NETWORKS = ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "timm:convnext_atto", "timm:repvgg_a0")


class LiveBytes(TorchDispatchMode):
    """Adds up the memory of all tensors that are made inside, from when they are made until they are no more."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._seen = {tensor.untyped_storage()._cdata: weakref.ref(tensor.untyped_storage()) for tensor in given}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Have Dynamo run what it compiled before."""
        return True

    def __torch_dispatch__(
        self, operator: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called for each operator that is run."""
        result = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _see(self, memory: torch.UntypedStorage) -> None:
        name, size = memory._cdata, memory.nbytes()
        if name in self._seen:
            return

        def freed(_: weakref.ref[torch.UntypedStorage]) -> None:
            del self._seen[name]
            self.live -= size

        self._seen[name] = weakref.ref(memory, freed)
        self.live += size


def measured_peak(function: Callable[..., Tensor], model: nn.Module, *inputs: Tensor) -> int:
    """The most bytes that live during a step of `function`, its parameters, buffers and inputs included."""
    given = [*model.parameters(), *model.buffers(), *inputs]
    function(*inputs)  # compiles
    model.zero_grad()
    with LiveBytes(given) as measured:
        output = function(*inputs)
        if output.requires_grad:
            output.backward(torch.ones_like(output))
    return measured.peak + sum(tensor.untyped_storage().nbytes() for tensor in given)


def compare(model: nn.Module, *inputs: Tensor, **options: Any) -> dict[str, int]:
    """Estimated and measured bytes."""
    torch.compiler.reset()
    estimate = convbn_compile.estimate_memory(model, *inputs, **options)
    function = torch.compile(model, backend="convbn_tune", options={"lowering": "aot_eager", **options})
    return {
        "saved, estimated": estimate.saved_bytes,
        "saved, measured": saved_for_backward(function, model, *inputs),
        "peak, estimated": estimate.peak_bytes,
        "peak, measured": measured_peak(function, model, *inputs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=NETWORKS, help="resnet18 of torchvision, or timm:repvgg_a0")
    parser.add_argument("--shape", type=int, nargs=4, default=(4, 3, 128, 128), help="of the batch")
    parser.add_argument("--mode", default="tune")
    parser.add_argument("--memory-budget", type=float, default=1.0)
    parser.add_argument("--json", type=Path, help="write the bytes and the configuration to this file")
    arguments = parser.parse_args()
    settings = {"mode": arguments.mode, "memory_budget": arguments.memory_budget}
    shape = tuple(arguments.shape)
    rows = {name: compare(make(name), torch.randn(shape), **settings) for name in tqdm(arguments.models, leave=False)}
    table = [[name, *(f"{number / MIB:.2f}" for number in row.values())] for name, row in rows.items()]
    print(tabulate(table, headers=["MiB", *next(iter(rows.values()))], disable_numparse=True))
    if arguments.json:
        write(arguments.json, {"bytes": rows}, shape=shape, **settings)


if __name__ == "__main__":
    main()

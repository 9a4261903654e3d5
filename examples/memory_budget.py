"""How many bytes a network saves for backward at each memory budget, in the modes Eval and Tune.

    python examples/memory_budget.py resnet50 --shape 2 3 128 128
    python examples/memory_budget.py timm:repvgg_a0 --budgets 1 0.5 --json budgets.json

Counted as in saved_bytes.py, on the graphs that Inductor gets, without code generation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from saved_bytes import MIB, make, write
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from convbn_compile.measure import saved_for_backward

BUDGETS = ("1", "0.99", "pointwise", "0.5", "0.25", "0.1")


def measure(model: nn.Module, shape: tuple[int, ...], budgets: list[str]) -> dict[str, dict[str, int]]:
    """Bytes saved for one batch of random images: budget, then mode, to bytes."""
    x, rows = torch.randn(shape), {}
    for budget in tqdm(budgets, desc=type(model).__name__, leave=False):
        value = budget if budget.isalpha() else float(budget)
        rows[budget] = {}
        for mode in ("eval", "tune"):
            torch.compiler.reset()
            options = {"mode": mode, "memory_budget": value, "lowering": "aot_eager"}
            rows[budget][mode] = saved_for_backward(
                torch.compile(model, backend="convbn_tune", options=options), model, x
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="resnet50 of torchvision, or timm:repvgg_a0")
    parser.add_argument("--shape", type=int, nargs=4, default=(2, 3, 128, 128), help="of the batch")
    parser.add_argument("--budgets", nargs="+", default=BUDGETS, help="numbers in (0, 1], and pointwise")
    parser.add_argument("--json", type=Path, help="write the bytes and the configuration to this file")
    arguments = parser.parse_args()
    shape = tuple(arguments.shape)
    rows = measure(make(arguments.model), shape, arguments.budgets)
    table = [[budget, *(f"{number / MIB:.2f}" for number in row.values())] for budget, row in rows.items()]
    print(tabulate(table, headers=["budget", "Eval, MiB", "Tune, MiB"], disable_numparse=True))
    if arguments.json:
        write(arguments.json, {"bytes": rows}, model=arguments.model, shape=shape)


if __name__ == "__main__":
    main()

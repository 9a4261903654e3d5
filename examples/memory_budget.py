"""How many bytes a network saves for backward at each memory budget, in the modes Eval and Tune, and its peak.

    python examples/memory_budget.py resnet50 --shape 2 3 128 128
    python examples/memory_budget.py timm:repvgg_a0 --budgets 1 0.5 --json budgets.json

Nothing is run: convbn_compile.estimate_memory adds up the graphs that Inductor gets.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from saved_bytes import MIB, make, write
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import convbn_compile

BUDGETS = ("1", "0.99", "pointwise", "0.5", "0.25", "0.1")
MODES = ("eval", "tune")


def measure(model: nn.Module, shape: tuple[int, ...], budgets: list[str]) -> dict[str, dict[str, dict[str, int]]]:
    """Budget, then mode, to bytes, for one batch of images."""
    x, model = torch.empty(shape, device="meta"), model.to("meta")
    rows: dict[str, dict[str, dict[str, int]]] = {budget: {} for budget in budgets}
    for budget, mode in tqdm([(budget, mode) for budget in budgets for mode in MODES], leave=False):
        value = budget if budget.isalpha() else float(budget)
        rows[budget][mode] = convbn_compile.estimate_memory(model, x, mode=mode, memory_budget=value).to_dict()
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
    kinds = [(kind, mode) for kind in ("saved", "peak") for mode in MODES]
    table = [
        [budget, *(f"{row[mode][f'{kind}_bytes'] / MIB:.2f}" for kind, mode in kinds)] for budget, row in rows.items()
    ]
    headers = ["MiB", *(f"{kind}, {mode.capitalize()}" for kind, mode in kinds)]
    print(tabulate(table, headers=headers, disable_numparse=True))
    if arguments.json:
        write(arguments.json, {"bytes": rows}, model=arguments.model, shape=shape)


if __name__ == "__main__":
    main()

"""The table of the paper's Appendix E again: ResNet-50 in Eval and Tune mode, and fused (the paper's Deploy).

    python examples/paper_table_e.py --json docs/benchmarks/paper_table_e_cpu_202611.json
    python examples/paper_table_e.py --device cuda --json paper_table_e_cuda.json

On a GPU a step of forward and backward is run: time, and torch.cuda.max_memory_allocated. Without one, bytes are
counted with fake tensors (convbn_compile.estimate_memory), which takes no more memory for a batch of 256 than for one.
What is in use at each operation grows with images and with pixels along a line, as long as the graph is the same: three
settings are traced, a fourth to see that it does, and the others follow, or are traced too where it does not.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from saved_bytes import MIB, make, write
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import convbn_compile
from convbn_compile.contenders import fused

GIB = 2**30

Setting = tuple[int, int]
"""Batch, and height and width of the images."""

CONTENDERS: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
    "Eval": ("eval", lambda model: model),
    "Tune": ("tune", lambda model: model),
    "fused network": ("eval", fused),
}
"""The mode, and what is done to the model."""

KINDS = {"Eval": "Eval", "Tune": "Tune", "fused network": "Deploy"}
"""What the paper calls them."""

PAPER: dict[Setting, tuple[float, ...]] = {
    (16, 224): (0.0505, 1.5671, 0.0467, 0.9727, 0.0448, 0.9397),
    (32, 224): (0.0948, 2.8237, 0.0849, 1.5973, 0.0831, 1.5631),
    (64, 224): (0.1837, 5.4125, 0.1613, 2.8617, 0.1590, 2.7808),
    (128, 224): (0.3577, 10.6001, 0.3081, 5.4088, 0.3060, 5.3284),
    (256, 224): (0.7035, 21.0107, 0.6001, 10.5011, 0.5966, 10.4234),
    (32, 256): (0.1110, 3.5965, 0.1032, 1.9732, 0.1011, 1.9416),
    (32, 288): (0.1488, 4.5130, 0.1382, 2.4325, 0.1356, 2.3728),
    (32, 320): (0.1761, 5.5216, 0.1630, 2.9207, 0.1609, 2.8363),
    (32, 352): (0.2153, 6.6120, 0.1991, 3.4546, 0.1969, 3.3682),
    (32, 384): (0.2503, 7.9005, 0.2304, 4.0995, 0.2281, 4.0219),
    (32, 416): (0.2983, 9.2317, 0.2738, 4.7429, 0.2721, 4.6640),
    (32, 448): (0.3567, 10.6448, 0.3104, 5.4306, 0.3077, 5.3421),
}

PAPER_COLUMNS = ("Eval s", "Eval GB", "Tune s", "Tune GB", "Deploy s", "Deploy GB")


def eager_saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps of an eager call; on meta nothing is run."""
    given = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers(), x)}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        saved[memory._cdata] = memory
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(memory.nbytes() for name, memory in saved.items() if name not in given)


def count(model: nn.Module, mode: str, setting: Setting) -> list[int]:
    """What a step saves for backward, eager and compiled, and what is in use at each operation, by fake tensors."""
    batch, size = setting
    x = torch.empty(batch, 3, size, size, device="meta")
    estimate = convbn_compile.estimate_memory(model, x, mode=mode)
    return [eager_saved_bytes(model, x), estimate.saved_bytes, *estimate.timeline]


def named(counted: Sequence[int]) -> dict[str, int]:
    """What `count` found, in words."""
    eager, saved, *timeline = counted
    return {"eager saved": eager, "saved": saved, "peak": max(timeline)}


@dataclass(frozen=True)
class Line:
    """bytes = (per_pixel * pixels + per_image) * batch + fixed; a pixel is one of 32x32, the least a ResNet has."""

    per_pixel: Fraction
    per_image: Fraction
    fixed: Fraction

    @classmethod
    def through(cls, known: dict[Setting, int]) -> Line:
        """The line through three settings: a small and a large batch, and the large batch with larger images."""
        (few, size), (many, _), (_, larger) = known
        one, more, most = known.values()
        slope = Fraction(more - one, many - few)
        per_pixel = Fraction(most - more, many * (_pixels(larger) - _pixels(size)))
        return cls(per_pixel, slope - per_pixel * _pixels(size), one - slope * few)

    def at(self, setting: Setting) -> int:
        """Bytes of any setting."""
        batch, size = setting
        return round((self.per_pixel * _pixels(size) + self.per_image) * batch + self.fixed)


def _pixels(size: int) -> int:
    return (size // 32) ** 2


def count_all(model: nn.Module, mode: str, settings: Sequence[Setting], name: str) -> dict[Setting, dict[str, int]]:
    """`count` for every setting, of which four are traced, and the others too if these are not on a line.

    Args:
        model: on meta.
        mode: of the backend.
        settings: two batches and more of one size, the first, and two sizes and more of one batch.
        name: told while one waits.
    """
    size, batches = settings[0][1], sorted({batch for batch, _ in settings})
    fixed = next(batch for batch, other in settings if other != size)
    few = next(batch for batch in batches if batch != fixed)
    largest = max(other for _, other in settings)
    four = [(few, size), (fixed, size), (fixed, largest), (batches[-1], size)]
    traced = {setting: count(model, mode, setting) for setting in tqdm(four, desc=name, leave=False)}
    lines = lines_through(traced)
    if lines is not None:
        return {setting: named([line.at(setting) for line in lines]) for setting in settings}
    rest = tqdm([setting for setting in settings if setting not in traced], desc=name, leave=False)
    traced |= {setting: count(model, mode, setting) for setting in rest}
    return {setting: named(traced[setting]) for setting in settings}


def lines_through(traced: dict[Setting, list[int]]) -> list[Line] | None:
    """A line for each number that `count` gives, through three settings; None if the fourth is not on all of them.

    Tune has other graphs for other sizes: a scale goes into the smaller one of weight and output.
    """
    *three, check = traced
    if len({len(numbers) for numbers in traced.values()}) > 1:
        return None
    columns = zip(*(traced[setting] for setting in three), strict=True)
    lines = [Line.through(dict(zip(three, column, strict=True))) for column in columns]
    return lines if [line.at(check) for line in lines] == traced[check] else None


def measure(model: nn.Module, mode: str, setting: Setting, steps: int) -> dict[str, float]:
    """The median time of a step on the GPU, and the most memory that tensors had, the model and gradients included."""
    torch.compiler.reset()
    batch, size = setting
    model, x = model.cuda(), torch.randn(batch, 3, size, size, device="cuda")
    function = torch.compile(model, backend="convbn_tune", options={"mode": mode})
    seconds = []
    for step in range(3 + steps):
        if step == 3:  # compiled, and cuDNN has chosen its algorithms
            torch.cuda.reset_peak_memory_stats()
        model.zero_grad()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function(x).sum().backward()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    peak = torch.cuda.max_memory_allocated()
    model.zero_grad()
    model.cpu()
    return {"seconds": statistics.median(seconds[3:]), "peak": peak}


def measure_all(model: nn.Module, mode: str, settings: Sequence[Setting], name: str) -> dict[Setting, dict[str, float]]:
    """`measure` for every setting."""
    return {setting: measure(model, mode, setting, steps=20) for setting in tqdm(settings, desc=name, leave=False)}


def rows_of(found: dict[str, dict[Setting, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each setting: ours, contender by contender, and the paper's."""
    rows = []
    for setting in next(iter(found.values())):
        paper = dict(zip(PAPER_COLUMNS, PAPER[setting], strict=True)) if setting in PAPER else {}
        ours = {name: dict(figures[setting]) for name, figures in found.items()}
        ours["Tune"].pop("eager saved", None)  # it is Eval's
        rows.append({"batch": setting[0], "size": setting[1], "paper": paper, **ours})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Peaks beside the paper's memory, and times if there are any."""
    lines, headers = [], ["batch", "size"]
    timed = "seconds" in rows[0]["Tune"]
    for name, theirs in KINDS.items():
        headers += [f"paper {theirs}, s", f"{name}, s"] if timed else []
        headers += [f"paper {theirs}, GB", f"{name} peak, GiB"] + ([] if timed else ["saved, GiB"])
    for row in rows:
        line: list[Any] = [row["batch"], row["size"]]
        for name, theirs in KINDS.items():
            ours = row[name]
            line += [row["paper"].get(f"{theirs} s"), f"{ours['seconds']:.4f}"] if timed else []
            line += [row["paper"].get(f"{theirs} GB"), f"{ours['peak'] / GIB:.3f}"]
            line += [] if timed else [f"{ours['saved'] / GIB:.3f}"]
        lines.append(line)
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def per_image(rows: Sequence[dict[str, Any]]) -> str:
    """What one more image takes, in MiB, by the smallest and the largest batch; the paper's GB taken for GiB."""
    few, many = (choose(rows, key=lambda row: row["batch"]) for choose in (min, max))
    images = (many["batch"] - few["batch"]) * MIB
    kinds = [kind for kind in ("eager saved", "saved", "peak") if kind in few["Eval"]]
    lines = []
    for name, theirs in KINDS.items():
        paper = (many["paper"][f"{theirs} GB"] - few["paper"][f"{theirs} GB"]) * GIB / images
        ours = [(many[name][kind] - few[name][kind]) / images if kind in few[name] else None for kind in kinds]
        lines.append([name, *("" if number is None else f"{number:.2f}" for number in (paper, *ours))])
    return tabulate(lines, headers=["MiB an image", "paper", *kinds], tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="of torchvision, or timm:repvgg_a0")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda runs steps, cpu counts bytes")
    parser.add_argument("--batches", type=int, nargs="+", default=(16, 32, 64, 128, 256), help="at the first of SIZES")
    parser.add_argument("--sizes", type=int, nargs="+", default=range(224, 449, 32), help="at the second of BATCHES")
    parser.add_argument("--json", type=Path, help="write the figures and the configuration to this file")
    arguments = parser.parse_args()
    size, batch = arguments.sizes[0], arguments.batches[1]
    settings = [*((it, size) for it in arguments.batches), *((batch, it) for it in arguments.sizes[1:])]
    found: dict[str, Any] = {}
    for name, (mode, change) in CONTENDERS.items():
        with torch.device("cpu" if arguments.device == "cuda" else "meta"):
            model = change(make(arguments.model))
        of_all = measure_all if arguments.device == "cuda" else count_all
        found[name] = of_all(model, mode, settings, name)
    rows = rows_of(found)
    print(table(rows))
    if arguments.model == "resnet50" and PAPER.keys() >= set(settings):
        print("\n" + per_image(rows))
    if arguments.json:
        gpu = torch.cuda.get_device_name() if arguments.device == "cuda" else None
        write(arguments.json, {"settings": rows}, model=arguments.model, device=arguments.device, gpu=gpu)


if __name__ == "__main__":
    main()

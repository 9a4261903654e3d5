"""make benchmarks: write the tables of README and of these pages, and the plots, from the JSON beside this file.

A page says where a table goes, and of which files it is made:

    <!-- compared: resnet18_cpu_202611.json resnet50_cpu_202611.json -->
    <!-- end -->

What stands between the two lines is written anew; TABLES below lists what there is.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from convbn_compile._bench_plot import plot
from convbn_compile.benchmark import MIB, Benchmark, Row, reasons, table

FOLDER = Path(__file__).parent
EXAMPLES = FOLDER.parents[1] / "examples"
PAGES = (FOLDER.parents[1] / "README.md", FOLDER.parent / "neuroflux.md", *sorted(FOLDER.glob("*.md")))
PLACE = re.compile(r"<!-- (?P<table>\w+): (?P<files>.+?) -->\n.*?<!-- end -->", flags=re.DOTALL)
NAMES = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "vgg11": "VGG-11",
    "vgg16": "VGG-16",
    "efficientnet_b0": "EfficientNet-B0",
    "mobilenet_v2": "MobileNetV2",
}

TIMES = "\N{MULTIPLICATION SIGN}"
Data = Mapping[str, Any]


def filled(text: str) -> str:
    """A page with its tables made from the JSON."""
    return PLACE.sub(_table, text)


def _table(place: re.Match[str]) -> str:
    files = place["files"].split()
    written = TABLES[place["table"]]([json.loads((FOLDER / file).read_text()) for file in files], files)
    return f"<!-- {place['table']}: {place['files']} -->\n{written}\n<!-- end -->"


def saved(data: Sequence[Data], _: Sequence[str]) -> str:
    """Bytes saved for backward in MiB, of examples/saved_bytes.py: a line for each network."""
    lines = [
        {"saved, MiB": _name(model), "input": TIMES.join(map(str, one["configuration"]["shape"])), **_mib(row)}
        for one in data
        for model, row in one["bytes"].items()
    ]
    return _markdown([list(line.values()) for line in lines], list(lines[0]))


def _mib(row: Mapping[str, int]) -> dict[str, str]:
    shown = {name: f"{number / MIB:.2f}" for name, number in row.items()}
    return shown | {"Tune": f"**{shown['Tune']}**"}


def compared(data: Sequence[Data], _: Sequence[str]) -> str:
    """Saved MiB, and the step as a share of the reference's: a line for each network and setting of bench."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for one in data:
        for row in Benchmark.from_dict(one).rows:
            sizes = [str(size) for size in (row.batch, row.size) if size is not None]
            key = (_name(one["configuration"]["model"]), f"{TIMES.join(sizes)}, {row.dtype}")
            lines.setdefault(key, {})[row.label] = _saved_and_ratio(row)
    labels = list(dict.fromkeys(label for line in lines.values() for label in line))
    rows = [[*key, *(line.get(label, "") for label in labels)] for key, line in lines.items()]
    return _markdown(rows, ["saved, MiB (step)", f"batch{TIMES}size", *labels])


def _saved_and_ratio(row: Row) -> str:
    if row.saved_bytes is None or row.ratio is None:
        return "-"
    return f"{row.saved_bytes / MIB:.2f} ({row.ratio:.2f})"


def everything(data: Sequence[Data], files: Sequence[str]) -> str:
    """All that bench found in one run, with the command, the machine and the plot."""
    [one] = data
    found, where = Benchmark.from_dict(one), one["configuration"]
    lowering = "" if where["lowering"] == "inductor" else ", without code generation"
    versions = f"torch {where['torch']}, Python {where['python']}, {where['date']}{lowering}"
    machine = f"{where['device']}, threads: {where['threads']}; {versions}"
    rows, headers = table([row for row in found.rows if not row.because])
    parts = [
        f"```\n{where['command']}\n```",
        f"{machine}. Ratio: to *{where['reference']}*, pair by pair, median of {where['steps']}.",
        _markdown(rows, headers),
        *(f"{reason}." for reason in reasons(found.rows)),
        f"![Memory and time of {where['model']}]({Path(files[0]).with_suffix('.png')})",
    ]
    return "\n\n".join(parts)


def contenders(data: Sequence[Data], _: Sequence[str]) -> str:
    """What each way of training takes in the same budget, of examples/neuroflux.py: a line for each."""
    lines = []
    for network, found in _trained(data):
        target = min(one["row"]["accuracy"] for one in found.values())
        budget = f"{found['NeuroFlux']['report']['memory_budget'] / MIB:.0f} MiB"
        lines.append([f"**{_name(network)}**, {budget}", "", "", "", "", f"to {target:.3f}"])
        for name, one in found.items():
            row = one["row"]
            seconds = [f"{row[key]:.0f}" for key in ("seconds", f"s to {target:.3f}")]
            lines.append(
                [name, row["batches"], f"{row['peak MiB']:.1f}", seconds[0], f"{row['accuracy']:.3f}", seconds[1]]
            )
    return _markdown(
        lines, ["", "batch sizes", "measured peak, MiB", "seconds", "best accuracy", "seconds to what all reach"]
    )


def beside_the_paper(data: Sequence[Data], _: Sequence[str]) -> str:
    """What NeuroFlux gains over backprop, of examples/neuroflux.py, beside what its paper says."""
    columns = [
        ["", *PAPER],
        *([_name(network), *_gained(found)] for network, found in _trained(data)),
        ["the paper", *PAPER.values()],
    ]
    headers, *lines = zip(*columns, strict=True)
    return _markdown(lines, headers)


PAPER = {
    "time to the accuracy that backprop comes to in the same budget": "2.3 to 6.1 times faster",
    "parameters of the chosen exit": "10.9 to 29.4 times fewer",
    "its images a second": "1.61 to 3.95 times",
    "its accuracy, and backprop's": "",
    "least R² of a line of memory": "",
}
"""Its lines, and the paper's figures (arXiv 2402.14139)."""


def _gained(found: Mapping[str, Data]) -> list[str]:
    """In the order of PAPER."""
    ours, theirs = found["NeuroFlux"], found["backprop"]
    row, goal = ours["row"], theirs["row"]["accuracy"]
    accuracy = row["exit's accuracy"]
    reached = min(row["accuracy"], goal)
    ratio = _seconds_to(theirs["report"], reached) / _seconds_to(ours["report"], reached)
    time = f"{ratio:.1f} times faster" if ratio >= 1 else f"{1 / ratio:.1f} times slower"
    return [
        time if reached == goal else f"not reached; {time} to {reached:.3f}",
        f"{row['fewer parameters']:.1f} times fewer",
        f"{row['throughput']:.1f} times",
        f"{accuracy:.3f}, {goal:.3f}",
        f"{min(unit['r2'] for unit in ours['profile']):.4f}",
    ]


def _trained(data: Sequence[Data]) -> list[tuple[str, Mapping[str, Data]]]:
    return [(network, found) for one in data for network, found in one.items() if network != "configuration"]


def _seconds_to(report: Data, accuracy: float) -> float:
    return next(epoch["seconds"] for epoch in report["history"] if max(epoch["accuracies"]) >= accuracy)


TABLES: Mapping[str, Callable[[Sequence[Data], Sequence[str]], str]] = {
    "saved": saved,
    "compared": compared,
    "everything": everything,
    "contenders": contenders,
    "beside_the_paper": beside_the_paper,
}


def _name(model: str) -> str:
    short = model.rpartition(":")[2]
    return NAMES.get(short, short)


def _markdown(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in (headers, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(headers), *lines[1:]])


def main() -> None:
    """Write the pages, a plot for each file of bench, and one for all of examples/neuroflux.py."""
    for page in PAGES:
        page.write_text(filled(page.read_text()))
    for file in sorted(FOLDER.glob("*.json")):
        data = json.loads(file.read_text())
        if "rows" in data:
            plot(Benchmark.from_dict(data), file.with_suffix(".png"), title=data["configuration"]["model"])
    sys.path.insert(0, str(EXAMPLES))
    files = sorted(FOLDER.glob("neuroflux_cpu_202611_*.json"))
    histories = {
        network: {name: one["report"]["history"] for name, one in found.items()}
        for network, found in _trained([json.loads(file.read_text()) for file in files])
    }
    import_module("neuroflux").plot(histories, FOLDER / "neuroflux_cpu_202611.png")


if __name__ == "__main__":
    main()

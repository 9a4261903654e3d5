"""bench: step time, saved bytes, peak memory and compile time of Tune mode beside what one would pick in its place."""

from __future__ import annotations

import itertools
import platform
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import convbn_compile
from convbn_compile import _torch
from convbn_compile import contenders as _contenders
from convbn_compile._arguments import count, listed, located, named
from convbn_compile._contest import WARMUPS, Contest
from convbn_compile._extras import require
from convbn_compile._setting import Setting, casts, known_dtype
from convbn_compile._wrapped import check_module, unwrapped
from convbn_compile.benchmark import Benchmark, Row
from convbn_compile.contenders import Contender
from convbn_compile.options import Lowering, Options


def bench(
    model: nn.Module,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    contenders: Sequence[str | Contender] = _contenders.DEFAULT,
    batches: Sequence[int] = (),
    sizes: Sequence[int] = (),
    dtypes: Sequence[str] = ("float32",),
    steps: int = 20,
    reference: str | None = None,
    lowering: str = "inductor",
    progress: bool = False,
) -> Benchmark:
    """Measure what a step of training takes, beside what one would pick in place of Tune mode.

    For each batch size, resolution and dtype, first each contender on its own: cold compile, saved bytes, peak memory,
    counts; then all of them in turn, step by step, so that all meet the same machine. Contenders get copies of the
    model, in eval mode but for `train`; the compile caches of the user are not touched, but Dynamo is reset.

    Args:
        model: the module; its device is where it is measured. requires_grad decides what is trained.
        inputs: what it is called with, for their shapes; values are random.
        kwargs: likewise, by name.
        contenders: of convbn_compile.contenders.NAMES, tune@0.5 and inductor@0.5 with memory budgets, or Contender.
        batches: first dimension of every input; none leaves it.
        sizes: dimensions from the third on of every input; none leaves them.
        dtypes: such as float32, bfloat16, or autocast-bfloat16.
        steps: timed ones of each contender.
        reference: the contender whose steps the others' are divided by; by default inductor, or else the first.
        lowering: inductor, or aot_eager for the same graphs without code generation, but PyTorch's pass.
        progress: show a bar, on a terminal.

    Returns:
        The benchmark. A contender that could not run has a row with the reason.

    Raises:
        TypeError: `model` is not a module, no input is a tensor, or another argument has the wrong type, as a name has
            where a list of names is needed.
        ValueError: an unknown contender, dtype or lowering, one that is there twice, no contender, no dtype, or a
            number below one.
        ModuleNotFoundError: psutil or tqdm is not installed.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> found = bench(net, torch.zeros(1, 3, 8, 8), contenders=["eager"], batches=[1, 2], steps=1)
        >>> [(row.batch, row.saved_bytes) for row in found.rows]
        [(1, 1152), (2, 2304)]
    """
    check_module(model, "bench")
    model, kwargs, steps = unwrapped(model), located("kwargs", named, kwargs), located("steps", count, steps)
    chosen = _contenders.contenders(contenders, Options.parse(options={"lowering": lowering}).lowering)
    reference = _reference(reference, chosen)
    settings = _settings(batches, sizes, dtypes)
    device = _device((inputs, kwargs))
    require("psutil", extra="bench")
    tqdm = require("tqdm", extra="bench").tqdm
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, _torch.leaving_no_trace():
        generates = lowering == Lowering.INDUCTOR.value and any(one.compile for one in chosen)
        prime = _prime(Path(folder), device, generates=generates)
        total = len(settings) * (2 * len(chosen) + WARMUPS + steps)
        with tqdm(total=total, disable=None if progress else True, leave=False) as bar:
            for number, setting in enumerate(settings):
                tell = partial(_tell, bar, setting)
                contest = Contest(setting, model, inputs, kwargs, prime, Path(folder) / str(number), tell)
                rows += contest.rows(chosen, steps=steps, reference=reference)
    arguments = {"contenders": [one.name for one in chosen], "steps": steps, "reference": reference}
    return Benchmark({**machine(device), "model": type(model).__name__, **arguments, "lowering": lowering}, tuple(rows))


def _tell(bar: Any, setting: Setting, what: str) -> None:
    """One step further."""
    bar.set_description(f"{setting}{what}")
    bar.update()


def _reference(name: str | None, contenders: Sequence[Contender]) -> str:
    """Of those that train, if any does."""
    names = [one.name for one in contenders if one.backward] or [one.name for one in contenders]
    if name is None:
        return "inductor" if "inductor" in names else names[0]
    if name not in names:
        raise ValueError(f"reference must be one of the contenders that train, {', '.join(names)}; got {name!r}.")
    return name


def _settings(batches: Any, sizes: Any, dtypes: Any) -> list[Setting]:
    """Each combination; checked."""
    batches = listed("batches", batches, count, example="[8, 32]")
    sizes = listed("sizes", sizes, count, example="[128, 224]")
    example = '["float32", "bfloat16"]'
    dtypes = listed("dtypes", dtypes, known_dtype, example=example, optional=False, key=casts)
    return [Setting(*each) for each in itertools.product(batches or (None,), sizes or (None,), dtypes)]


def _device(inputs: Any) -> torch.device:
    """Where the inputs are; checked."""
    tensors = _torch.tensors_in(inputs)
    if not tensors:
        raise TypeError("bench needs what the model is called with, such as torch.zeros(8, 3, 224, 224).")
    return tensors[0].device


def _prime(folder: Path, device: torch.device, *, generates: bool) -> Path:
    """Compile caches with what all graphs share, such as precompiled headers, so that none pays for it."""
    prime = folder / "prime"
    prime.mkdir()
    if generates:
        with _torch.compile_caches_in(prime):
            _torch.compile_apart(torch.neg)(torch.ones(16, device=device))
    return prime


def machine(device: torch.device) -> dict[str, Any]:
    """When, where and by which versions."""
    return {
        "date": date.today().isoformat(),
        "convbn_compile": convbn_compile.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """The CPU's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

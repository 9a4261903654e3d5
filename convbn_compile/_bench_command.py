"""convbn-compile bench: its arguments, and what it measures."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from convbn_compile._setting import dtype_of
from convbn_compile.bench import bench
from convbn_compile.benchmark import Benchmark
from convbn_compile.contenders import ALL, DEFAULT, NAMES, contender
from convbn_compile.options import Lowering


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of bench alone, but for the inputs and the files."""
    add = parser.add_argument
    add("--batch", type=_at_least_1, nargs="+", default=[], metavar="N", help="batch sizes")
    add("--size", type=_at_least_1, nargs="+", default=[], metavar="N", help="resolutions: sizes from dimension 2 on")
    add(
        "--dtype",
        type=_checked(dtype_of),
        nargs="+",
        default=["float32"],
        help="of model and inputs, such as bfloat16; or autocast-bfloat16 (default: float32)",
    )
    add(
        "--contenders",
        type=_checked(lambda name: name == "all" or contender(name)),
        nargs="+",
        default=list(DEFAULT),
        metavar="NAME",
        help=f"{', '.join(NAMES)}; tune and inductor also with a memory budget, such as tune@0.5; or all "
        f"(default: {' '.join(DEFAULT)})",
    )
    add("--steps", type=_at_least_1, default=20, metavar="N", help="timed steps of each contender (default: 20)")
    add("--reference", metavar="NAME", help="whose steps the others' are divided by (default: inductor, or the first)")
    add(
        "--lowering",
        choices=[lowering.value for lowering in Lowering],
        default=Lowering.INDUCTOR.value,
        help="aot_eager: the same graphs without code generation, for a quick look at memory",
    )
    add("--device", type=_checked(torch.device), default="cpu", help="such as cuda (default: cpu)")
    add("--threads", type=_at_least_1, metavar="N", help="of a CPU")


def _at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def _checked(check: Callable[[str], Any]) -> Callable[[str], str]:
    """A type of arguments: the text itself, if nothing is wrong with it."""

    def parse(text: str) -> str:
        try:
            check(text)
        except (ValueError, RuntimeError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return parse


def measure(
    model: nn.Module, args: list[Tensor], kwargs: Mapping[str, Tensor], arguments: argparse.Namespace
) -> Benchmark:
    """The benchmark that the arguments ask for; its configuration says by which command.

    Raises:
        ValueError: the reference is none of the contenders, or one of them is there twice.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = arguments.device
    found = bench(
        model.to(device),
        *(tensor.to(device) for tensor in args),
        kwargs={name: tensor.to(device) for name, tensor in kwargs.items()},
        contenders=ALL if "all" in arguments.contenders else arguments.contenders,
        batches=arguments.batch,
        sizes=arguments.size,
        dtypes=arguments.dtype,
        steps=arguments.steps,
        reference=arguments.reference,
        lowering=arguments.lowering,
        progress=True,
    )
    command = {"command": f"convbn-compile {shlex.join(arguments.argv)}", "model": arguments.model}
    return replace(found, configuration={**found.configuration, **command})

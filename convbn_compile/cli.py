"""convbn-compile: what the backend does to a model, what its batch norms are like, and what a step takes.

Exit codes: 0 done; 1 done, and there was nothing: no norm folded, none that has running statistics, or no contender
that ran; 2 wrong usage; 3 the model could not be loaded or run, a package is missing, or a file could not be written;
130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from tabulate import tabulate
from torch import Tensor, nn

import convbn_compile
from convbn_compile import _bench_command, _bench_plot, diagnose, models
from convbn_compile._extras import require
from convbn_compile._files import add_file, written
from convbn_compile._grouped import grouped, pattern, with_ranges, without_numbers
from convbn_compile.explain import explain_mode
from convbn_compile.options import Mode
from convbn_compile.report import Report

DONE, NOTHING, FAILED, INTERRUPTED = 0, 1, 3, 130
"""Exit codes; 2 is argparse's for wrong usage, 130 what shells have for SIGINT."""


class UsageError(Exception):
    """The arguments are wrong, which only the model could tell."""


@dataclass(frozen=True)
class Input:
    """One input of the model: random numbers of a shape and dtype, by position or by name."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Input:
        """From [NAME=]4,3,224,224[:DTYPE].

        Raises:
            argparse.ArgumentTypeError: it is none.
        """
        parts = re.fullmatch(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:,\d+)*)(?::(?P<dtype>\w+))?", text)
        if parts is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not of the form [NAME=]4,3,224,224[:DTYPE]")
        dtype = getattr(torch, parts["dtype"] or "float32", None)
        if not isinstance(dtype, torch.dtype):
            raise argparse.ArgumentTypeError(f"{parts['dtype']!r} is no dtype of torch, such as float32, int64, bool")
        return cls(tuple(int(size) for size in parts["shape"].split(",")), dtype, parts["name"] or "")

    def make(self) -> Tensor:
        """Normal numbers if it is floating-point; else zeros and ones, which every vocabulary has."""
        if self.dtype.is_floating_point or self.dtype.is_complex:
            return torch.randn(self.shape, dtype=self.dtype)
        return torch.randint(0, 2, self.shape).to(self.dtype)

    def __str__(self) -> str:
        name = f"{self.name}=" if self.name else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{name}{','.join(map(str, self.shape))}" + ("" if dtype == "float32" else f":{dtype}")


# --- explain -----------------------------------------------------------------------------------------------------


def explain_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of explain alone."""
    _input_argument(parser)
    _all_argument(parser)
    parser.add_argument(
        "--mode",
        choices=("tune", "deploy"),
        default="tune",
        help="tune: with gradients, for fine-tuning (default); deploy: without, for inference",
    )


def _input_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        type=Input.parse,
        action="append",
        metavar="[NAME=]SHAPE[:DTYPE]",
        help="what the model is called with, such as 4,3,224,224 or pixel_values=2,3,64,64 or 2,16:int64; "
        "once for each input; libraries' models have a default",
    )


def explain(arguments: argparse.Namespace) -> int:
    """Which norms are folded, which not and why, and the bytes saved for backward."""
    with _stdout_for_results_only():
        model = _load(arguments)
        inputs = arguments.input or _default_inputs(arguments.model, model)
        _tell(f"tracing it with {' '.join(map(str, inputs))}")
        report = _explain(model, inputs, Mode.parse(arguments.mode))
    if arguments.json:
        described = {"inputs": [str(item) for item in inputs], "mode": arguments.mode}
        print(as_json(arguments, {**described, **report.to_dict()}))
    else:
        width = os.get_terminal_size(sys.stdout.fileno()).columns if sys.stdout.isatty() else None
        print(explained(report, every=arguments.all, width=width))
    return DONE if report.folded or report.merged else NOTHING


def _default_inputs(name: str, model: nn.Module) -> list[Input]:
    shapes = models.default_shapes(name, model)
    if not shapes:
        example = "input_ids=2,16:int64" if getattr(model, "main_input_name", "") == "input_ids" else "4,3,224,224"
        raise UsageError(f"{name}: say what it is called with, such as --input {example}")
    return [Input(shape, name=argument) for argument, shape in shapes.items()]


def _made(inputs: Sequence[Input]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What the model is called with, by position and by name."""
    return [item.make() for item in inputs if not item.name], {item.name: item.make() for item in inputs if item.name}


def _explain(model: nn.Module, inputs: Sequence[Input], mode: Mode) -> Report:
    args, kwargs = _made(inputs)
    with torch.set_grad_enabled(mode is not Mode.DEPLOY):
        try:
            return explain_mode(mode, model, args, kwargs)
        except (Exception, SystemExit) as error:  # noqa: BLE001  whatever it is, the model itself may say it better
            cause = _eager_failure(model, args, kwargs) or error
            given = " ".join(map(str, inputs))
            raise models.ModelError(f"it could not be run with {given}: {models.brief(cause)}") from cause


def _eager_failure(model: nn.Module, args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> BaseException | None:
    """What the model itself says of these inputs, which is shorter than what Dynamo says."""
    try:
        model(*args, **kwargs)
    except (Exception, SystemExit) as error:  # noqa: BLE001  it is what we look for
        return error
    return None


def explained(report: Report, *, every: bool = False, width: int | None = None) -> str:
    """A table of the norms, and the facts in one line.

    Args:
        report: of convbn_compile.explain.
        every: a line for each norm; otherwise norms of like paths and fates share one.
        width: columns to fit into, by wrapping the reasons.
    """
    done = {"branches": "merged"}
    lines: list[Line] = [(item.module, item.kind, done.get(item.kind, "folded"), "") for item in report.rewrites]
    lines += [(item.module, item.kind, "left alone", item.reason) for item in report.refused]
    if not lines:
        return report.summary()
    headers = ["norm", *([] if every else ["count"]), "kind", "outcome", "because"]
    rows = [list(line) for line in lines] if every else [_one_line(group) for group in grouped(lines, _likeness)]
    table = tabulate(rows, headers, disable_numparse=True, maxcolwidths=_widths(rows, headers, width))
    return f"{table}\n\n{report.totals()}"


Line = tuple[str, str, str, str]
"""Module path, kind, outcome, reason."""


def _likeness(line: Line) -> Line:
    """What lines that are put together have in common."""
    path, kind, outcome, reason = line
    return pattern(path, last=kind == "branches"), kind, outcome, without_numbers(reason)


def _one_line(group: Sequence[Line]) -> list[str]:
    path, kind, outcome, _ = group[0]
    name = path if len(group) == 1 else _likeness(group[0])[0]
    return [name, str(len(group)), kind, outcome, with_ranges(line[-1] for line in group)]


def _widths(rows: list[list[str]], headers: list[str], width: int | None) -> list[int | None] | None:
    """As wide as they are, the last as wide as is left."""
    if width is None:
        return None
    taken = sum(2 + max(map(len, column)) for column in list(zip(headers, *rows, strict=True))[:-1])
    return [None] * (len(headers) - 1) + [max(20, width - taken)]


# --- diagnose ----------------------------------------------------------------------------------------------------


def diagnose_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of diagnose alone."""
    _all_argument(parser)
    add_file(parser, "--plot", "write a histogram, such as scales.png or scales.svg", diagnose.FORMATS)


def run_diagnose(arguments: argparse.Namespace) -> int:
    """By how much folding scales each channel's weight, and what that does to training in Deploy mode."""
    if arguments.plot:
        require("matplotlib", extra="bench")
    with _stdout_for_results_only():
        model = _load(arguments)
        report = convbn_compile.scaling_coefficients(model)
        if arguments.plot and report.all.sgd_rates:
            diagnose.plot(report, arguments.plot, title=arguments.model)
    print(as_json(arguments, report.to_dict()) if arguments.json else diagnose.text(report, every=arguments.all))
    if arguments.plot and not report.all.sgd_rates:
        print(f"{arguments.plot} was not written: no norm has a scale above 0.", file=sys.stderr)
    library, _ = models.split(arguments.model)
    if library and not arguments.pretrained and not arguments.checkpoint:
        print("These weights are random; see --pretrained and --checkpoint.", file=sys.stderr)
    return DONE if report.norms else NOTHING


# --- bench -------------------------------------------------------------------------------------------------------


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of bench alone."""
    _input_argument(parser)
    _bench_command.add_arguments(parser)
    add_file(parser, "--out", "write the JSON to this file", (".json",))
    add_file(parser, "--plot", "memory and time, such as bench.png", diagnose.FORMATS)


def run_bench(arguments: argparse.Namespace) -> int:
    """Step time, memory and compile time of contenders."""
    if arguments.plot:
        require("matplotlib", extra="bench")
    with _stdout_for_results_only():
        model = _load(arguments)
        inputs = arguments.input or _default_inputs(arguments.model, model)
        try:
            found = _bench_command.measure(model, *_made(inputs), arguments)
        except ValueError as error:
            raise UsageError(str(error)) from error
    facts = as_json(arguments, found.to_dict())
    try:
        print(facts if arguments.json else found, flush=True)
    finally:  # also for a reader that has seen enough
        json_written = written(arguments.out, lambda file: file.write_text(facts + "\n"))
        plot_written = written(arguments.plot, lambda file: _bench_plot.plot(found, file, title=arguments.model))
    if not (json_written and plot_written):
        return FAILED
    return NOTHING if all(row.because for row in found.rows) else DONE


# --- the command line --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A subcommand: what it is for, its own arguments, examples, and what runs it and returns the exit code."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    examples: tuple[str, ...]


COMMANDS: Mapping[str, Command] = {
    "explain": Command(
        "which norms are folded, which not and why, and the bytes saved for backward",
        explain_arguments,
        explain,
        (
            "timm:repvgg_a0",
            "torchvision:resnet18 --input 8,3,128,128",
            "transformers:ResNetModel --input pixel_values=2,3,64,64 --json",
            "models.py:make_detector --input 1,3,320,320 --mode deploy --all",
        ),
    ),
    "diagnose": Command(
        "by how much folding scales each channel's weight, and what that does to training in Deploy mode",
        diagnose_arguments,
        run_diagnose,
        (
            "timm:resnet50 --pretrained --plot scales.png",
            "torchvision:resnet18 --checkpoint weights.pt",
            "models.py:make_detector --all",
        ),
    ),
    "bench": Command(
        "step time, memory and compile time of Tune mode beside what one would pick in its place",
        bench_arguments,
        run_bench,
        (
            "torchvision:resnet18 --batch 8 32 --size 128 224 --out resnet18.json --plot resnet18.png",
            "timm:efficientnet_b0 --batch 8 --contenders inductor tune tune@0.5 tune@0.25 checkpoint",
            "torchvision:resnet50 --device cuda --dtype float32 bfloat16 --contenders all --json",
        ),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; those of the process if None, whose file descriptor 1 then becomes that of stderr.

    Returns:
        The exit code.

    Raises:
        SystemExit: after --help, with code 0, and on wrong usage, with code 2.
    """
    if argv is None:
        _keep_stdout_for_results()
    arguments = make_parser().parse_args(argv, argparse.Namespace(argv=sys.argv[1:] if argv is None else list(argv)))
    parser: argparse.ArgumentParser = arguments.parser
    torch.manual_seed(0)
    try:
        code = COMMANDS[arguments.command].run(arguments)
        sys.stdout.flush()
        return code
    except UsageError as error:
        parser.error(str(error))
    except BrokenPipeError:  # whoever reads has seen enough, as head has; else Python would complain at exit
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        print("convbn-compile: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001  a message and an exit code for the shell
        if arguments.traceback:
            traceback.print_exc()
        ours = isinstance(error, (models.ModelError, ModuleNotFoundError))
        print(f"convbn-compile: {error if ours else models.brief(error)}", file=sys.stderr)
        return FAILED


def make_parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    parser = argparse.ArgumentParser(
        prog="convbn-compile",
        description="Fine-tune convolutional networks at the cost of fused ones: what that does to a model.",
        epilog=__doc__.partition("\n\n")[2],
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {convbn_compile.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        examples = "\n".join(f"  convbn-compile {name} {example}" for example in command.examples)
        subparser = commands.add_parser(
            name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _common_arguments(subparser)
        command.arguments(subparser)
        subparser.set_defaults(parser=subparser)
    return parser


def _common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=_model, metavar="MODEL", help=models.FORMS)
    parser.add_argument("--pretrained", action="store_true", help="with the weights that the library downloads")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a state_dict of torch.save or safetensors")
    parser.add_argument("--json", action="store_true", help="JSON, and nothing else, on stdout")
    parser.add_argument("--traceback", action="store_true", help="of an error, too")


def _all_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="a line for each norm, also those of like paths")


def _model(name: str) -> str:
    try:
        models.split(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def _load(arguments: argparse.Namespace) -> nn.Module:
    _tell(f"loading {arguments.model}")
    return models.load_model(arguments.model, pretrained=arguments.pretrained, checkpoint=arguments.checkpoint)


def _tell(what: str) -> None:
    """Say what is being done, which may take seconds, to somebody who looks."""
    if sys.stderr.isatty():
        print(f"{what} ...", file=sys.stderr)


def as_json(arguments: argparse.Namespace, facts: Mapping[str, Any]) -> str:
    """What was found, and by which versions."""
    versions = {"convbn_compile": convbn_compile.__version__, "torch": torch.__version__}
    return json.dumps({"model": arguments.model, **versions, **facts}, indent=2)


def _keep_stdout_for_results() -> None:
    """From now on sys.stdout alone leads to stdout: what C code writes to file descriptor 1 goes to stderr.

    Streams that were closed lead nowhere; characters that stdout's encoding lacks are written as escapes.
    """
    if sys.stderr is None:
        sys.stderr = _nowhere()
    if sys.stdout is None:
        sys.stdout = _nowhere()
        return
    number = sys.stdout.fileno()
    sys.stdout = os.fdopen(os.dup(number), "w", encoding=sys.stdout.encoding, errors="backslashreplace")
    os.dup2(sys.stderr.fileno(), number)


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


def _stdout_for_results_only() -> contextlib.AbstractContextManager[Any]:
    """What libraries print meanwhile goes to stderr."""
    return contextlib.redirect_stdout(sys.stderr)

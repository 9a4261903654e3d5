"""The torch.compile backend "convbn_tune": options in, compiled function out, the facts told. No algebra."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor, fx

from convbn_compile import _cached_report, _torch
from convbn_compile.joint_pass import FAILED
from convbn_compile.lowering import SPLIT_BY_DDP, lower
from convbn_compile.options import Mode, Options
from convbn_compile.report import Report

logger = logging.getLogger("convbn_compile")


def convbn_tune(
    gm: fx.GraphModule,
    inputs: Sequence[Tensor],
    *,
    mode: str | Mode | None = None,
    options: Mapping[str, Any] | None = None,
) -> _torch.CompiledFunction:
    """Compile one graph of Dynamo's; called by torch.compile(model, backend="convbn_tune"), not by users.

    Args:
        gm: the graph that Dynamo captured.
        inputs: its inputs, parameters and buffers included.
        mode: train, eval, tune (default) or deploy, in any case, or one of Inductor's presets, which means tune.
        options: mode, lowering, memory_budget, merge_branches, and Inductor configuration keys.

    Returns:
        A function that computes what the graph computes.

    Raises:
        ValueError: an unknown mode, option or value; deploy with a gradient asked for.
        TypeError: a value of the wrong type.

    Examples:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
        >>> net = torch.compile(net, backend="convbn_tune", options={"lowering": "aot_eager"})
        >>> net(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 4, 6, 6])
    """
    try:
        parsed = Options.parse(mode, options)
    except (ValueError, TypeError) as error:
        raise _torch.visible_through_dynamo(error) from None
    return compile_graph(gm, inputs, parsed)


def compile_graph(gm: fx.GraphModule, inputs: Sequence[Tensor], options: Options) -> _torch.CompiledFunction:
    """Compile one graph of Dynamo's with options that are parsed already, and tell what was done."""
    reports: list[Report] = []
    name = None
    with _telling():
        name = _cached_report.key(gm, inputs, options)
    compiled = lower(gm, inputs, options, reports.append, measure=logger.isEnabledFor(logging.INFO))
    with _telling():
        if options.mode.folds and name is not None:
            report = _cached_report.store(name, Report.sum(reports)) if reports else _cached_report.load(name)
            _tell(report, options)
    return compiled


@contextlib.contextmanager
def _telling() -> Iterator[None]:
    """A failure inside costs the report only: a user's training never dies of what we tell."""
    try:
        yield
    except Warning:
        raise
    except Exception as error:  # noqa: BLE001
        warn_once(f"convbn_tune could not report what it did: {error!r}. Please report this.")


def _tell(report: Report | None, options: Options) -> None:
    """One INFO line per compiled graph; one warning if nothing is folded although there is batch norm.

    A part of a graph that DistributedDataParallel split may have no convolution before its only norm: no reason to warn
    of, as the other parts fold.
    """
    if report is None:
        logger.info("%s: from the compile cache; convbn_compile.explain(model, *inputs) reports", options.mode.value)
        return
    logger.info("%s: %s", options.mode.value, report.summary())
    reasons = report.reasons("batch norm", "affine")
    reason = next((it for it in reasons if not it.startswith(FAILED) and not it.endswith(SPLIT_BY_DDP)), None)
    if options.mode is Mode.TUNE and not report.folded and not report.merged and reason:
        warn_once(_nothing_folded(reason))


@lru_cache
def warn_once(message: str) -> None:
    """Warn, unless the same was said before: Dynamo resets what Python's own filter has seen."""
    warnings.warn(message, stacklevel=2)


def _nothing_folded(reason: str) -> str:
    """The same words for every graph with the same reason."""
    advice = (
        "Freeze it before compiling: convbn_compile.turn_on(model), or convbn_compile.freeze_batch_norm(model)."
        if "training mode" in reason
        else "convbn_compile.explain(model, *inputs) lists every one."
    )
    return f"convbn_tune folded no batch norm of a graph, which trains as with plain Inductor: {reason}. {advice}"

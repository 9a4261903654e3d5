"""From a Dynamo graph to a callable: the joint pass, then Inductor, or the graphs as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from convbn_compile import _torch, joint_pass, memory_budget
from convbn_compile._constants import constant_nodes
from convbn_compile._fold_kernels import reduce_kernels
from convbn_compile._region import OUTSIDE
from convbn_compile.deploy import keep_constants
from convbn_compile.options import Lowering, Mode, Options
from convbn_compile.report import Refusal, Report
from convbn_compile.saved_bytes import saved_bytes

OnReport = Callable[[Report], None]


def lower(
    gm: fx.GraphModule,
    inputs: Sequence[Tensor],
    options: Options,
    on_report: OnReport,
    *,
    measure: bool = False,
    on_lowered: _torch.OnLowered | None = None,
) -> _torch.CompiledFunction:
    """Compile one Dynamo graph.

    Args:
        gm: the graph.
        inputs: its inputs, as Dynamo hands them over.
        options: what the user asked for.
        on_report: called with the report of the joint pass each time that it runs; it does not run in the modes train
            and eval, unless there is a memory budget, nor on a graph that comes from the compile cache.
        measure: find the bytes saved for backward before and after, which takes two more runs of the partitioner.
        on_lowered: called with the graphs that run in the end, if the lowering is aot_eager.
    """
    failures: list[Exception] = []
    if _torch.is_ddp_part(gm):
        on_report = _naming_ddp(on_report)
    keeps = options.mode is Mode.DEPLOY and _torch.counts_versions(gm, inputs)
    run = _joint_pass(options, on_report, failures.append, measure=measure, keeps=keeps)
    try:
        return _lower(gm, inputs, options, run, keeps=keeps, on_lowered=on_lowered)
    except Exception:
        if not failures:
            raise
        return _lower(gm, inputs, options, None, keeps=keeps, on_lowered=on_lowered)


SPLIT_BY_DDP = "DistributedDataParallel splits the graph at the boundaries of its gradient buckets"
"""How the reason ends that a norm has if its convolution may be in another part of the graph."""


def _naming_ddp(on_report: OnReport) -> OnReport:
    """Say of norms whose input comes from outside the graph that it was DistributedDataParallel that split it."""

    def named(refusal: Refusal) -> Refusal:
        outside = OUTSIDE in refusal.reason
        return replace(refusal, reason=f"{refusal.reason}; {SPLIT_BY_DDP}") if outside else refusal

    return lambda report: on_report(replace(report, refused=tuple(map(named, report.refused))))


def _lower(
    gm: fx.GraphModule,
    inputs: Sequence[Tensor],
    options: Options,
    joint_pass: _torch.GraphPass | None,
    *,
    keeps: bool,
    on_lowered: _torch.OnLowered | None,
) -> _torch.CompiledFunction:
    """Compile it; if it `keeps`, what is made of parameters and buffers alone is kept between calls."""
    common: dict[str, Any] = {"config": options.inductor, "memory_budget": options.memory_budget}
    if options.mode is Mode.DEPLOY:
        common["config"] = {**options.inductor, "freezing": False}  # it would not follow the weights
    if keeps:
        common["on_inference"] = partial(keep_constants, for_inductor=options.lowering is Lowering.INDUCTOR)
    if options.lowering is Lowering.AOT_EAGER:
        common["on_lowered"] = on_lowered or (lambda _: None)
        return _torch.compile_with_aot_eager(gm, inputs, joint_pass=joint_pass, **common)
    runs = options.mode.folds or options.memory_budget != 1.0
    common |= {"last_pass": reduce_kernels, "uuid": uuid(options)}
    return _torch.compile_with_inductor(gm, inputs, joint_pass=joint_pass if runs else None, **common)


def _joint_pass(
    options: Options, on_report: OnReport, on_failure: Callable[[Exception], None], *, measure: bool, keeps: bool
) -> _torch.GraphPass:
    """The joint pass of a mode, as a function of the graph alone."""
    fold = options.fold if options.mode.folds else None
    rewrite = partial(joint_pass.run, fold=fold, merge_branches=options.merge_branches)
    if keeps:
        rewrite = partial(rewrite, constants=lambda graph: constant_nodes(graph, _torch.static_inputs()))

    def report_on(graph: fx.Graph) -> Report:
        if not _torch.is_joint(graph):
            return rewrite(graph)
        module = graph.owning_module
        assert module is not None, "a joint graph has a module"
        before = _measured(graph) if measure else None
        report = rewrite(graph)
        note = memory_budget.apply(module.graph, options.memory_budget)
        after = _measured(module.graph) if measure else None
        return replace(report, saved_bytes_before=before, saved_bytes_after=after, notes=(note,) if note else ())

    def run(graph: fx.Graph) -> None:
        if options.mode is Mode.DEPLOY:
            _refuse_gradients(graph)
        try:
            on_report(report_on(graph))
        except Exception as error:
            on_failure(error)
            raise

    return run


def _measured(graph: fx.Graph) -> int | None:
    """Saved bytes; None, with a warning, if they cannot be found."""
    try:
        return saved_bytes(graph)
    except Exception as error:  # noqa: BLE001  a user's training never dies of what we tell
        warnings.warn(f"convbn_tune could not measure saved bytes: {error!r}. Please report this.", stacklevel=2)
        return None


def _refuse_gradients(graph: fx.Graph) -> None:
    """Raise if the graph has a backward part."""
    if _torch.is_joint(graph):
        error = ValueError(
            'mode="deploy" computes no gradients, but this call asks for them: grad mode is on and a parameter or '
            "input requires grad. Call the model under torch.no_grad() or torch.inference_mode(), or compile it with "
            'mode="tune", which has all gradients.'
        )
        raise _torch.visible_through_dynamo(error)


@lru_cache(maxsize=1)
def sources_hash() -> str:
    """A hash of this package's sources and of torch's version."""
    files = sorted(str(file) for file in Path(__file__).parent.rglob("*.py"))
    return _torch.get_hash_for_files(tuple(files)).hex()


def uuid(options: Options) -> str:
    """What tells the compile caches one joint pass from another: our sources and the options that it reads."""
    read = (options.mode.value, options.fold.value, options.memory_budget, options.merge_branches)
    return f"convbn_tune {sources_hash()} {read}"

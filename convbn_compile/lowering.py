"""From a Dynamo graph to a callable: the joint pass, then Inductor, or the graphs as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from torch import Tensor, fx

from convbn_compile import _torch, joint_pass
from convbn_compile.options import Lowering, Mode, Options
from convbn_compile.report import Report
from convbn_compile.saved_bytes import saved_bytes

OnReport = Callable[[Report], None]


def lower(
    gm: fx.GraphModule, inputs: Sequence[Tensor], options: Options, on_report: OnReport, *, measure: bool = False
) -> _torch.CompiledFunction:
    """Compile one Dynamo graph.

    Args:
        gm: the graph.
        inputs: its inputs, as Dynamo hands them over.
        options: what the user asked for.
        on_report: called with the report of the joint pass each time that it runs; it does not run in the modes train
            and eval, nor on a graph that comes from the compile cache.
        measure: find the bytes saved for backward before and after, which takes two more runs of the partitioner.
    """
    run = _joint_pass(options, on_report, measure=measure)
    if options.lowering is Lowering.AOT_EAGER:
        return _torch.compile_with_aot_eager(
            gm, inputs, joint_pass=run, config=options.inductor, memory_budget=options.memory_budget
        )
    return _torch.compile_with_inductor(
        gm,
        inputs,
        joint_pass=run if options.mode.folds else None,
        uuid=uuid(options),
        config=options.inductor,
        memory_budget=options.memory_budget,
    )


def _joint_pass(options: Options, on_report: OnReport, *, measure: bool) -> _torch.GraphPass:
    """The joint pass of a mode, as a function of the graph alone."""
    fold = options.fold if options.mode.folds else None

    def run(graph: fx.Graph) -> None:
        if options.mode is Mode.DEPLOY:
            _refuse_gradients(graph)
        if not measure or not _torch.is_joint(graph):
            on_report(joint_pass.run(graph, fold=fold))
            return
        module = graph.owning_module
        assert module is not None, "a joint graph has a module"
        before = saved_bytes(graph)
        report = joint_pass.run(graph, fold=fold)
        on_report(replace(report, saved_bytes_before=before, saved_bytes_after=saved_bytes(module.graph)))

    return run


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

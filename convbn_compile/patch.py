"""patch_inductor, unpatch_inductor, inductor_patched: Tune mode where a trainer cannot be told to use our backend.

Some trainers name no backend but "inductor". Inside inductor_patched(), or after patch_inductor(), every plain
torch.compile(model), model.compile() and @torch.compile compiles as backend="convbn_tune" would.

torch.compile decides at its own call, not at the first call of what it returns (torch 2.11 to 2.15): the patch must be
there when the trainer calls torch.compile, need not be there when the model runs, and a model keeps what it was
compiled with. Not patched are torch._dynamo.optimize("inductor"), AOTInductor and torch._inductor.compile, which do not
go through torch.compile's backend. The patch is one per process: processes that a trainer starts need their own, and
threads share it without a lock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from convbn_compile import _torch
from convbn_compile.backend import compile_graph
from convbn_compile.options import Options


def patch_inductor(**options: Any) -> None:
    """From now on, torch.compile with Inductor compiles as backend="convbn_tune" with these options.

    Presets (mode=) and configuration keys (options=) that a call of torch.compile brings are Inductor's, as ever, and
    go before those given here. Called again, the new options hold; one unpatch_inductor() undoes all.

    Args:
        options: mode, lowering, memory_budget, merge_branches, fold, and Inductor configuration keys.

    Raises:
        ValueError: an unknown mode, option or value.
        TypeError: a value of the wrong type.

    Examples:
        >>> patch_inductor(memory_budget=0.5)
        >>> unpatch_inductor()
    """
    tuning = _Tuning(Options.parse(options=options))
    _torch.redirect_inductor(tuning, tuning.options.inductor)


def unpatch_inductor() -> None:
    """Undo patch_inductor: what is compiled from now on is Inductor's own.

    Models that were compiled while it was patched stay as they are.

    Raises:
        ValueError: Inductor is not patched.
    """
    if not _torch.is_inductor_redirected():
        raise ValueError("unpatch_inductor: Inductor is not patched. Call convbn_compile.patch_inductor() first.")
    _torch.undo_redirect_inductor()


@contextlib.contextmanager
def inductor_patched(**options: Any) -> Iterator[None]:
    """patch_inductor inside; afterwards it is as it was before, patched or not. It may be nested: the inner one holds.

    Args:
        options: as in patch_inductor.

    Raises:
        ValueError: an unknown mode, option or value.
        TypeError: a value of the wrong type.

    Examples:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
        >>> with inductor_patched(lowering="aot_eager"):
        ...     net = torch.compile(net)
        >>> net(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 4, 6, 6])
    """
    tuning = _Tuning(Options.parse(options=options))
    with _torch.inductor_redirected(tuning, tuning.options.inductor):
        yield


@dataclass(frozen=True)
class _Tuning:
    """Compiles a graph in Inductor's place. Equal if the options are: Dynamo then shares compiled code."""

    options: Options

    def __call__(
        self, gm: fx.GraphModule, inputs: Sequence[Tensor], config: Mapping[str, Any]
    ) -> _torch.CompiledFunction:
        return compile_graph(gm, inputs, replace(self.options, inductor=config))

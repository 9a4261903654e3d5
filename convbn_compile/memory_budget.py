"""The memory budget of one graph: what backward may recompute, and which level of AOTAutograd's budget serves best.

AOTAutograd's solver is not monotone: now and then it saves more at a smaller budget (pytorch#197838). Budgets are read
on the scale LEVELS, each as the level at or below it, and of that level and all above it the one is taken at which the
least is saved, of equals the largest, which recomputes least. A smaller budget has all the candidates of a larger one,
so that it never saves more.

Whatever the budget, random numbers are not drawn again for backward, which the solver would (torch 2.13).
"""

from __future__ import annotations

import warnings
from types import BuiltinFunctionType

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from convbn_compile import _torch
from convbn_compile.options import POINTWISE
from convbn_compile.saved_bytes import saved_bytes_at

LEVELS = (1.0, 0.99, *(step / 20 for step in range(19, 0, -1)), 0.02, 0.01)
"""The scale, from all that is worth saving down to next to nothing; 0.99 is what recomputes what is cheap."""


def apply(graph: Graph, budget: float | str) -> str | None:
    """Prepare a joint graph, rewritten already, for the partitioner, and set AOTAutograd's budget for it.

    Args:
        graph: of a compile that was given the budget.
        budget: what the user asked for; with 1.0 what they configured of AOTAutograd stays.

    Returns:
        What to tell the user, if the budget is not the one that was asked for.
    """
    if budget == 1.0 and _torch.memory_budget() == 1.0:
        return None
    try:
        _keep(graph, all_but_pointwise=budget == POINTWISE)
        if budget == 1.0:
            return None
        level, note = (1.0, None) if isinstance(budget, str) else choose(graph, budget)
    except Exception as error:  # noqa: BLE001  a user's training never dies of our optimisation
        warnings.warn(
            f"convbn_tune left memory_budget={budget!r} to AOTAutograd, because its own choice failed: "
            f"{type(error).__name__}: {error}. Please report this.",
            stacklevel=2,
        )
        return None
    _torch.set_memory_budget(level)
    return note


def choose(graph: Graph, budget: float) -> tuple[float, str | None]:
    """Of the levels that a budget allows the one at which the least is saved, and what is to be told of it."""
    asked = next((level for level in LEVELS if level <= budget), LEVELS[-1])
    allowed = LEVELS[: LEVELS.index(asked) + 1]
    saved = saved_bytes_at(graph, allowed)
    if not saved:
        return budget, None
    best = min(allowed, key=lambda level: (saved[level], -level))
    if saved[best] < saved[asked]:
        less = (saved[asked] - saved[best]) / 2**20
        return best, f"memory budget {best:g} in place of {budget:g}: AOTAutograd saves {less:.2f} MiB less with it"
    return best, None


def _keep(graph: Graph, *, all_but_pointwise: bool) -> None:
    """Forbid to recompute what draws random numbers, or else all that is not elementwise, a view or a constant."""
    for node in graph.nodes:
        if "recompute" in node.meta or _torch.is_backward(node) or not _is_tensor_operator(node):
            continue
        if _draws(node) or (all_but_pointwise and not _is_cheap(node)):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _is_tensor_operator(node: Node) -> bool:
    """Not arithmetic of sizes, nor one output of several, which is kept or not with what has them."""
    is_call = node.op == "call_function" and not isinstance(node.target, BuiltinFunctionType)
    return is_call and bool(_torch.tensors_in(node.meta.get("val")))


def _draws(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _is_cheap(node: Node) -> bool:
    """True for what costs a read and a write at most; what reads no tensor makes constants."""
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return pointwise or _torch.is_view(node) or not node.all_input_nodes

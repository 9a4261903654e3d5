"""A frozen network that side networks tap: the forwards of its blocks, set on the modules; and back again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from convbn_compile.side_tuning._blocks import Block
from convbn_compile.side_tuning._forward import Code, Forward
from convbn_compile.side_tuning._side_network import SideNetwork
from convbn_compile.side_tuning._step import Step
from convbn_compile.side_tuning._watch import Watch


class Installed:
    """Side networks of one or more tasks at the blocks of one network.

    Up to the first block that a task adapts all tasks have the same features, which are computed once; behind it the
    batch is that of the first task, then that of the second, and so on.

    Args:
        model: the network.
        blocks: all.
        adapted: the number of the first one whose output is adapted. It and those before run without a graph.
        sides: of each task; they are children of the model.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], adapted: int, sides: Sequence[SideNetwork]) -> None:
        self.adapted, self.watch = adapted, Watch(model)
        self.steps = [Step(block, sides, self.watch, frozen=block.index <= adapted) for block in blocks]
        for step, after in zip(self.steps, self.steps[1:], strict=False):
            if step.tapped and step.block.stage == after.block.stage:
                step.after, after.follows = after, True
        codes: dict[Any, Code] = {}
        for step in self.steps:
            code = codes.setdefault(step.kind, Code(Step.run))
            step.block.module.__dict__["forward"] = Forward(code, step, step.block.module)

    def remove(self) -> None:
        """All is as it was; a forward that somebody else set since then stays."""
        self.watch.remove()
        for step in self.steps:
            own = step.block.module.__dict__
            if isinstance(own.get("forward"), Forward):
                del own["forward"]

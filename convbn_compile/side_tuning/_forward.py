"""The forward of a block: run of its step, with a code object that it shares with steps of its kind.

Dynamo counts recompilations for each code object. With one for all, blocks that are compiled one by one would soon be
at its limit, behind which they run in eager mode without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

from torch import nn


class Code:
    """A copy of a function, with a code object of its own; a copy or pickle of it has another.

    Args:
        function: of a module or class, without closure.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)

    def __reduce__(self) -> tuple[Any, ...]:
        return Code, (self.function,)


class Forward(partial[Any]):
    """What calls the copy with a step and its module, before what the block is called with.

    Args:
        code: of the function.
        step: whose method it is.
        module: the block, given as in a method: Dynamo skips functions without a tensor or module.
    """

    code: Code

    def __new__(cls, code: Code, step: Any, module: nn.Module) -> Forward:
        """A partial of the copy."""
        made = super().__new__(cls, code.copy, step, module)
        made.code = code
        return made

    def __reduce__(self) -> tuple[Callable[..., Forward], tuple[Any, ...]]:
        return Forward, (self.code, *self.args)

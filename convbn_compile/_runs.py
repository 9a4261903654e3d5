"""Runs of blocks, children of one module that follow each other: as a user names them, and what is handed on inside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn


@dataclass(frozen=True)
class Run:
    """A run of blocks, the children of one module.

    Attributes:
        path: of the parent.
        parent: whose children they are.
        names: of the blocks among the children, in order.
    """

    path: str
    parent: nn.Module
    names: tuple[str, ...]

    @property
    def paths(self) -> list[str]:
        """Of the blocks."""
        return [joined(self.path, name) for name in self.names]

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules."""
        return [self.parent.get_submodule(name) for name in self.names]


class HandedOn:
    """What a block hands on to the next one of its run in place of a tensor.

    Whoever else wants what is between blocks gets an error.

    Args:
        value: whatever it is.
        at: the block that it comes from, or is for.
        message: of the error, as a string or what str() makes one of.
    """

    def __init__(self, value: Any, at: Any, message: Any) -> None:
        self.value, self.at, self.message = value, at, message

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__") or "message" not in self.__dict__:
            raise AttributeError(name)
        self._refuse(name)

    def __getitem__(self, index: Any) -> NoReturn:
        self._refuse(f"[{index!r}]")

    def _refuse(self, what: str) -> NoReturn:
        raise RuntimeError(f"{self.message} Here {what} of what is between its blocks was asked for.")


class Named:
    """The runs that a user named in an argument of a function.

    Args:
        model: the model.
        function: for messages.
        argument: likewise.
    """

    def __init__(self, model: nn.Module, function: str, argument: str) -> None:
        self.model, self.function, self.argument = model, function, argument

    def runs(self, given: Any) -> list[Run]:
        """Of the argument.

        Args:
            given: for each run the path of a module whose children are its blocks, or the paths of the blocks.

        Raises:
            TypeError: it is neither.
            ValueError: there is no such module; blocks that are not children of one module, next to each other.
        """
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise TypeError(f'{self.function}: {self.argument} is a list, such as ["layer3"], got {given!r}.')
        found = [self._run(one) for one in given]
        if not found:
            raise ValueError(f"{self.function}: {self.argument} is empty. None finds the blocks of known classes.")
        self._check_once([path for run in found for path in run.paths])
        return found

    def module(self, path: str) -> nn.Module:
        """Of a path.

        Raises:
            ValueError: there is none.
        """
        try:
            return self.model.get_submodule(path)
        except AttributeError as error:
            raise ValueError(f"{self.function}: the model has no module {path!r}.") from error

    def _run(self, given: Any) -> Run:
        if isinstance(given, str):
            path, names = given, tuple(self.module(given)._modules)
        elif isinstance(given, Sequence) and given and all(isinstance(path, str) for path in given):
            parents = {path.rpartition(".")[0] for path in given}
            if len(parents) > 1:
                raise ValueError(
                    f"{self.function}: a list of blocks in {self.argument} has children of one module, got "
                    f"{list(given)!r}."
                )
            path, names = parents.pop(), tuple(path.rpartition(".")[2] for path in given)
        else:
            raise TypeError(
                f"{self.function}: {self.argument} is a list of paths of modules whose children are blocks, such as "
                f'"layer3", or of lists of the blocks\' paths; got {given!r} ({type(given).__name__}).'
            )
        for name in names:
            self.module(joined(path, name))
        parent = self.module(path)
        children = list(parent._modules)
        first = children.index(names[0]) if names else 0
        if not names or tuple(children[first : first + len(names)]) != names:
            raise ValueError(
                f"{self.function}: the blocks of a list in {self.argument} follow each other among the children of "
                f"{path or 'the model'}, which are {', '.join(children) or 'none'}; got {', '.join(names) or 'none'}."
            )
        return Run(path, parent, names)

    def _check_once(self, paths: Sequence[str]) -> None:
        modules = [self.module(path) for path in paths]
        for index, path in enumerate(paths):
            if modules[index] in modules[:index]:
                raise ValueError(f"{self.function}: {self.argument} has {path} twice.")
            outer = next((other for other in paths if path.startswith(f"{other}.")), None)
            if outer is not None:
                raise ValueError(f"{self.function}: {path} is inside of {outer}, which {self.argument} has, too.")


def check_untouched(path: str, block: nn.Module, consequence: str) -> None:
    """See to it that a block is called as its class has it.

    Args:
        path: of the block.
        block: the module.
        consequence: of hooks and the like, and what to do, for the message.

    Raises:
        ValueError: it has hooks, or a forward of its own.
    """
    hooks = hooks_of(block)
    what = "hooks" if hooks else "a forward of its own" if "forward" in block.__dict__ else None
    if what:
        which = f" Hooks: {', '.join(hooks)}." if hooks else ""
        raise ValueError(f"{path} has {what}, {consequence}{which}")


def hooks_of(block: nn.Module) -> list[str]:
    """The names of what else runs when the block is called, or in its backward."""
    kinds = (block._forward_hooks, block._forward_pre_hooks, block._backward_hooks, block._backward_pre_hooks)
    return [_name(hook) for hooks in kinds for hook in hooks.values()]


def _name(hook: Any) -> str:
    function = getattr(hook, "func", hook)  # of a partial
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def joined(path: str, name: str) -> str:
    """The path of a child."""
    return f"{path}.{name}" if path else name

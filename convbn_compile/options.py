"""Mode and Options: what a user may ask for, parsed and checked."""

from __future__ import annotations

import difflib
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from convbn_compile import _torch


class Mode(str, Enum):
    """What the backend does with a graph; which statistics a batch norm uses is decided by the model alone."""

    TRAIN = "train"
    EVAL = "eval"
    TUNE = "tune"
    DEPLOY = "deploy"

    @property
    def folds(self) -> bool:
        """True if convolution-norm pairs are folded."""
        return self in (Mode.TUNE, Mode.DEPLOY)

    @classmethod
    def parse(cls, mode: str | Mode) -> Mode:
        """A mode from its name, in any case."""
        if not isinstance(mode, str):
            raise TypeError(f"mode must be a string, one of {_names(cls)}; got {mode!r} ({type(mode).__name__}).")
        if mode.lower() not in _values(cls):
            known = [*_values(cls), *_torch.inductor_presets()]
            raise ValueError(f"Unknown mode {mode!r}. {_nearest(mode, known)}")
        return cls(mode.lower())


class Lowering(str, Enum):
    """What runs the graphs."""

    INDUCTOR = "inductor"
    AOT_EAGER = "aot_eager"


class Fold(str, Enum):
    """Which of the folds that would be right are done."""

    AUTO = "auto"
    ALWAYS = "always"


POINTWISE = "pointwise"
"""The memory budget that has a name: recompute elementwise operators, and nothing else."""


@dataclass(frozen=True)
class Options:
    """The options of one torch.compile call.

    Attributes:
        mode: what to do with the graph.
        lowering: "inductor", or "aot_eager" for the same joint pass and partitioner without code generation.
        memory_budget: AOTAutograd's activation_memory_budget for this compile, in (0, 1], or "pointwise".
        merge_branches: merge parallel convolutions of one input.
        fold: "auto" leaves out the folds that do not pay, "always" does all that are right.
        inductor: configuration handed on to Inductor.
    """

    mode: Mode = Mode.TUNE
    lowering: Lowering = Lowering.INDUCTOR
    memory_budget: float | str = 1.0
    merge_branches: bool = True
    fold: Fold = Fold.AUTO
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, mode: str | Mode | None = None, options: Mapping[str, Any] | None = None) -> Options:
        """From the `mode` and `options` of torch.compile.

        Args:
            mode: train, eval, tune or deploy, in any case, or one of Inductor's presets, which means tune.
            options: keys of ours, and Inductor configuration keys.

        Raises:
            ValueError: an unknown mode, key or value; the message names the nearest known one.
            TypeError: a value of the wrong type.
        """
        if options is not None and not isinstance(options, Mapping):
            raise TypeError(f"options must be a dict, got {options!r} ({type(options).__name__}).")
        given = dict(options or {})
        if mode is not None and "mode" in given:
            raise ValueError(f"mode is given twice: mode={mode!r} and options['mode']={given['mode']!r}.")
        mode = given.pop("mode", mode)
        presets = _torch.inductor_presets()
        preset: dict[str, Any] = {}
        if isinstance(mode, str) and mode in presets:
            preset = presets[mode]
        elif mode is not None:
            given["mode"] = mode
        ours = {key: check(given.pop(key)) for key, check in _CHECKS.items() if key in given}
        parsed = cls(**ours, inductor={**preset, **_inductor_options(given)})
        if parsed.mode is Mode.DEPLOY and parsed.inductor.get("freezing"):
            raise ValueError(
                'mode="deploy" and Inductor\'s freezing exclude each other: freezing keeps the weights of the first '
                "call for good, deploy follows them. Leave freezing out."
            )
        _warn_of_no_effect(parsed)
        return parsed


def _warn_of_no_effect(options: Options) -> None:
    ignored = sorted(set(options.inductor) - {_torch.USERS_PASS})
    if options.lowering is Lowering.AOT_EAGER and ignored:
        warnings.warn(
            f'lowering="aot_eager" generates no code, so these Inductor options have no effect: {", ".join(ignored)}.',
            stacklevel=3,
        )


Choice = typing.TypeVar("Choice", Lowering, Fold)


def _choice(option: str, kind: type[Choice]) -> Callable[[Any], Choice]:
    """A check of an option that has a few names for values."""

    def check(name: Any) -> Choice:
        if not isinstance(name, str):
            raise TypeError(f"{option} must be a string, one of {_names(kind)}; got {name!r} ({type(name).__name__}).")
        if name not in _values(kind):
            raise ValueError(f"Unknown {option} {name!r}. {_nearest(name, _values(kind))}")
        return kind(name)

    return check


def _check_memory_budget(budget: Any) -> float | str:
    known = f"memory_budget must be a number in (0, 1], or {POINTWISE!r}"
    if isinstance(budget, str):
        if budget != POINTWISE:
            raise ValueError(f"{known}; got {budget!r}. {_nearest(budget, [POINTWISE])}")
        return budget
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(f"{known}; got {budget!r} ({type(budget).__name__}).")
    if not 0 < budget <= 1:
        raise ValueError(f"{known}; got {budget!r}. Less than 1 saves less and recomputes more.")
    return float(budget)


def _check_merge_branches(merge: Any) -> bool:
    if not isinstance(merge, bool):
        raise TypeError(f"merge_branches must be True or False, got {merge!r} ({type(merge).__name__}).")
    return merge


_CHECKS: Mapping[str, Callable[[Any], Any]] = {
    "mode": Mode.parse,
    "lowering": _choice("lowering", Lowering),
    "memory_budget": _check_memory_budget,
    "merge_branches": _check_merge_branches,
    "fold": _choice("fold", Fold),
}


def _inductor_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that are not ours, checked as torch.compile(backend="inductor") checks them."""
    known = _torch.inductor_config()
    checked: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("-", "_") if isinstance(key, str) else key
        if name not in known:
            raise ValueError(f"Unknown option: {key!r} {_unknown(str(key), known)}")
        kind = _torch.inductor_type(name)
        if typing.get_origin(kind) is None and not isinstance(value, kind):
            raise TypeError(f"Option {key!r} must be of type {kind.__name__}, got {value!r} ({type(value).__name__}).")
        checked[name] = value
    return checked


def _values(kind: type[Enum]) -> list[str]:
    return [item.value for item in kind]


def _names(kind: type[Enum]) -> str:
    return ", ".join(repr(name) for name in _values(kind))


def _unknown(key: str, known: Iterable[str]) -> str:
    """What an option that nobody knows may have been meant to be."""
    if key in ("fullgraph", "dynamic", "disable", "backend", "options"):
        return f"is an argument of torch.compile, not an option: torch.compile(..., {key}=...)."
    what = "is neither an option of convbn_tune nor an Inductor configuration key."
    return f"{what} {_nearest(key, [*_CHECKS, *known])}"


def _nearest(name: str, known: Iterable[str]) -> str:
    """A hint: the nearest known name if there is one, and all if they are few."""
    known = list(known)
    close = difflib.get_close_matches(name.lower(), known, n=1)
    hints = [f"Did you mean {close[0]!r}?"] if close else []
    if len(known) < 12:
        hints.append(f"Known: {', '.join(map(repr, known))}.")
    elif not close:
        hints.append(f"Options of convbn_tune: {', '.join(map(repr, _CHECKS))}.")
    return " ".join(hints)

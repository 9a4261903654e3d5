"""turn_on, turn_off, freeze_batch_norm, unfreeze_batch_norm: modes of a model, in place."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, TypeVar

from torch import nn

from convbn_compile import _torch
from convbn_compile.options import Mode, Options

Model = TypeVar("Model", bound=nn.Module)


def turn_on(model: Model, mode: str = "tune", *, skip: Collection[str] = (), **options: Any) -> Model:
    """Compile a model in place in one of the modes; with running statistics that a later model.train() leaves alone.

    The one line of the paper (arXiv 2305.11624, section 4). Parameters, buffers and the keys of state_dict stay as
    they are; the model still pickles, copies and saves, as the uncompiled one.

    Args:
        model: the module to compile.
        mode: tune, eval or deploy, which freeze batch norm, or train, which leaves it on batch statistics.
        skip: module paths of batch norms that are not frozen, such as ("head.bn",).
        options: lowering, memory_budget, merge_branches, and Inductor configuration keys.

    Returns:
        The same model.

    Raises:
        ValueError: an unknown mode or option; no batch norm in the model, or one without running statistics; the model
            is already on.
        TypeError: `model` is not a module, or is one that torch.compile returned.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        >>> turn_on(net, lowering="aot_eager").train()[1].training
        False
        >>> turn_off(net)[1].training
        True
    """
    _check_model(model, "turn_on")
    parsed = Options.parse(options={**options, "mode": mode})
    if _torch.is_compiled_in_place(model):
        raise ValueError(
            "turn_on: the model is already compiled, by turn_on or by nn.Module.compile(). "
            "Call convbn_compile.turn_off(model) first."
        )
    if not any(True for _ in _batch_norms(model)):
        raise ValueError(_no_batch_norm("turn_on", model))
    if parsed.mode is not Mode.TRAIN:
        _freeze(model, skip, by_turn_on=True)
    _torch.compile_in_place(model, backend="convbn_tune", options={**options, "mode": parsed.mode.value})
    return model


def turn_off(model: Model) -> Model:
    """Undo turn_on: the model runs uncompiled, and the batch norms that turn_on froze are as if they never were.

    Args:
        model: a model that turn_on was called on.

    Returns:
        The same model.

    Raises:
        ValueError: the model is not on.
        TypeError: `model` is not a module.
    """
    _check_model(model, "turn_off")
    frozen = [module for module in model.modules() if (train := _frozen(module)) is not None and train.by_turn_on]
    if not frozen and not _torch.is_compiled_in_place(model):
        raise ValueError("turn_off: the model is not on. Call convbn_compile.turn_on(model) first.")
    _torch.undo_compile(model)
    for module in frozen:
        _unfreeze_one(module)
    return model


def freeze_batch_norm(model: Model, *, skip: Collection[str] = ()) -> Model:
    """Keep every batch norm in eval mode, on its running statistics, through any later model.train().

    Parameters stay trainable; set requires_grad yourself to freeze them too.

    Args:
        model: the module whose batch norms (nn.BatchNorm1d/2d/3d, nn.SyncBatchNorm and subclasses) are frozen.
        skip: module paths of batch norms to leave out.

    Returns:
        The same model.

    Raises:
        ValueError: there is no batch norm, one has no running statistics, or `skip` names none.
        TypeError: `model` is not a module.

    Examples:
        >>> net = freeze_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
        >>> net.train()[1].training
        False
    """
    _check_model(model, "freeze_batch_norm")
    if not any(True for _ in _batch_norms(model)):
        raise ValueError(_no_batch_norm("freeze_batch_norm", model))
    _freeze(model, skip, by_turn_on=False)
    return model


def unfreeze_batch_norm(model: Model) -> Model:
    """Undo freeze_batch_norm: each batch norm gets the mode that train() and eval() asked of it meanwhile.

    Batch norms that turn_on froze stay frozen until turn_off.

    Args:
        model: a module with frozen batch norms.

    Returns:
        The same model.

    Raises:
        ValueError: freeze_batch_norm froze nothing here.
        TypeError: `model` is not a module.
    """
    _check_model(model, "unfreeze_batch_norm")
    frozen = [module for module in model.modules() if (train := _frozen(module)) is not None and not train.by_turn_on]
    if not frozen:
        raise ValueError(
            "unfreeze_batch_norm: freeze_batch_norm froze no batch norm of this model. "
            "What turn_on froze, convbn_compile.turn_off(model) unfreezes."
        )
    for module in frozen:
        _unfreeze_one(module)
    return model


class _StayInEval:
    """Stands in for a batch norm's train(): remembers the mode that is asked for, and stays in eval mode."""

    def __init__(self, module: nn.Module, *, by_turn_on: bool) -> None:
        self.module = module
        self.by_turn_on = by_turn_on
        self.asked_for = module.training

    def __call__(self, mode: bool = True) -> nn.Module:  # noqa: FBT001, FBT002  as nn.Module.train
        self.asked_for = mode
        return self.module


def _batch_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, _torch.BatchNormModule):
            yield name, module


def _frozen(module: nn.Module) -> _StayInEval | None:
    train = module.__dict__.get("train")
    return train if isinstance(train, _StayInEval) else None


def _freeze(model: nn.Module, skip: Collection[str], *, by_turn_on: bool) -> None:
    """Freeze all or nothing."""
    norms = dict(_batch_norms(model))
    unknown = sorted(set(skip) - set(norms))
    if unknown:
        raise ValueError(f"skip names {unknown[0]!r}, which is no batch norm of this model. There are: {_some(norms)}.")
    chosen = {name: module for name, module in norms.items() if name not in skip}
    for name, module in chosen.items():
        if module.running_mean is None or module.running_var is None:
            raise ValueError(
                f"{name or 'the model'}: running_mean is None, so its eval mode would still use batch statistics. "
                f"Build it with track_running_stats=True, or pass skip=({name!r},)."
            )
    for module in chosen.values():
        if _frozen(module) is None:
            train = _StayInEval(module, by_turn_on=by_turn_on)
            module.training = False
            module.__dict__["train"] = train


def _unfreeze_one(module: nn.Module) -> None:
    train = module.__dict__.pop("train")
    module.training = train.asked_for


def _check_model(model: Any, caller: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller} needs a torch.nn.Module, got {model!r} ({type(model).__name__}).")
    if hasattr(model, "_orig_mod"):
        raise TypeError(f"{caller} needs the module itself, not what torch.compile returned: pass model._orig_mod.")


def _no_batch_norm(caller: str, model: nn.Module) -> str:
    return (
        f"{caller}: {type(model).__name__} has no nn.BatchNorm1d/2d/3d or nn.SyncBatchNorm, so there are no running "
        'statistics to keep. A model without batch norm can be compiled with torch.compile(backend="convbn_tune").'
    )


def _some(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return shown + (", ..." if len(names) > 5 else "")

"""turn_on, turn_off, freeze_batch_norm, unfreeze_batch_norm: modes of a model, in place."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, TypeVar

from torch import nn

from convbn_compile import _distributed, _torch
from convbn_compile._wrapped import check_module
from convbn_compile.options import Mode, Options

Model = TypeVar("Model", bound=nn.Module)


def turn_on(model: Model, mode: str = "tune", *, skip: Collection[str] = (), **options: Any) -> Model:
    """Compile a model in place in one of the modes; with running statistics that a later model.train() leaves alone.

    The one line of the paper (arXiv 2305.11624, section 4). Parameters, buffers and the keys of state_dict stay as
    they are; the model still pickles, copies and saves, as the uncompiled one.

    Args:
        model: the module to compile; of a DistributedDataParallel the module inside, before or after wrapping.
        mode: tune, eval or deploy, which freeze batch norm, or train, which leaves it on batch statistics; or one of
            Inductor's presets, which means tune.
        skip: module paths of batch norms that are not frozen, such as ("head.bn",); in the module inside
            DistributedDataParallel.
        options: lowering, memory_budget, merge_branches, fold, and Inductor configuration keys.

    Returns:
        The same model.

    Raises:
        ValueError: an unknown mode or option; no batch norm in the model, or one without running statistics; the model
            is already on.
        TypeError: `model` is not a module, or is one of TorchScript or that torch.compile returned.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        >>> turn_on(net, lowering="aot_eager").train()[1].training
        False
        >>> turn_off(net)[1].training
        True
    """
    inner = _check_model(model, "turn_on")
    parsed = Options.parse(options={**options, "mode": mode})
    if _torch.is_compiled_in_place(model) or _torch.is_compiled_in_place(inner):
        if _HELD in inner.__dict__:
            raise ValueError("turn_on: the model is already compiled, by turn_on. Call turn_off(model) first.")
        raise ValueError(
            "turn_on: the model is already compiled, by nn.Module.compile(). Call turn_on instead of it; "
            "copy.deepcopy(model) is a copy that is not compiled."
        )
    norms = _norms_to_freeze(inner, skip, "turn_on")
    _distributed.warn_of_sharded_containers(inner, "turn_on")
    _torch.compile_in_place(inner, backend="convbn_tune", options={**options, "mode": mode})
    _release(inner)
    inner.__dict__[_HELD] = [] if parsed.mode is Mode.TRAIN else norms
    hold_batch_norms(inner.__dict__[_HELD])
    return model


def turn_off(model: Model) -> Model:
    """Undo turn_on: the model runs uncompiled, and the batch norms that turn_on froze are as if they never were.

    Args:
        model: a model that turn_on was called on, or DistributedDataParallel around it.

    Returns:
        The same model.

    Raises:
        ValueError: the model is not on.
        TypeError: `model` is not a module.
    """
    inner = _check_model(model, "turn_off")
    if _HELD not in inner.__dict__:
        raise ValueError("turn_off: the model is not on. Call convbn_compile.turn_on(model) first.")
    _torch.undo_compile(inner)
    _release(inner)
    return model


def freeze_batch_norm(model: Model, *, skip: Collection[str] = ()) -> Model:
    """Keep every batch norm in eval mode, on its running statistics, through any later model.train().

    Parameters stay trainable; set requires_grad yourself to freeze them too.

    Args:
        model: the module whose batch norms (nn.BatchNorm1d/2d/3d, nn.SyncBatchNorm and subclasses) are frozen.
        skip: module paths of batch norms to leave out; in the module inside DistributedDataParallel.

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
    inner = _check_model(model, "freeze_batch_norm")
    for module in _norms_to_freeze(inner, skip, "freeze_batch_norm"):
        _stand_in(module).frozen = True
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
    frozen = [train for module in model.modules() if (train := _frozen(module)) is not None and train.frozen]
    if not frozen:
        raise ValueError(
            "unfreeze_batch_norm: freeze_batch_norm froze no batch norm of this model. "
            "What turn_on froze, convbn_compile.turn_off(model) unfreezes."
        )
    for train in frozen:
        train.frozen = False
        train.step_back()
    return model


_HELD = "_norms_held_by_turn_on"
"""Where turn_on leaves, in a model's __dict__, the batch norms that it keeps frozen."""


class _StayInEval:
    """Stands in for a batch norm's train(): remembers the mode that is asked for, and stays in eval mode.

    Attributes:
        frozen: freeze_batch_norm asks for it.
        held: how many models that are on ask for it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.frozen = False
        self.held = 0
        self.training_before = module.training
        self.asked_for: bool | None = None
        module.training = False
        module.__dict__["train"] = self

    def __call__(self, mode: bool = True) -> nn.Module:  # noqa: FBT001, FBT002  as nn.Module.train
        self.asked_for = mode
        return self.module

    def step_back(self) -> None:
        """Give the module its own train() back, unless somebody still needs it frozen."""
        if self.frozen or self.held:
            return
        del self.module.__dict__["train"]
        self.module.training = self.training_before
        if self.asked_for is not None:
            self.module.train(self.asked_for)


def _frozen(module: nn.Module) -> _StayInEval | None:
    train = module.__dict__.get("train")
    return train if isinstance(train, _StayInEval) else None


def _stand_in(module: nn.Module) -> _StayInEval:
    return _frozen(module) or _StayInEval(module)


def _release(model: nn.Module) -> None:
    """Let go of what turn_on holds."""
    let_go_of_batch_norms(model.__dict__.pop(_HELD, []))


def hold_batch_norms(norms: Iterable[nn.Module]) -> None:
    """Keep batch norms in eval mode through train(), until as many let go of them."""
    for module in norms:
        _stand_in(module).held += 1


def let_go_of_batch_norms(norms: Iterable[nn.Module]) -> None:
    """Undo hold_batch_norms, once."""
    for module in norms:
        train = _frozen(module)
        if train is not None:
            train.held -= 1
            train.step_back()


def _norms_to_freeze(model: nn.Module, skip: Collection[str], caller: str) -> list[nn.Module]:
    """The batch norms of a model, each once, without those to skip; checked."""
    modules = model.named_modules(remove_duplicate=False)
    norms = {name: module for name, module in modules if isinstance(module, _torch.BatchNormModule)}
    if not norms:
        raise ValueError(_no_batch_norm(caller, model))
    unknown = sorted(set(skip) - set(norms))
    if unknown:
        raise ValueError(f"skip names {unknown[0]!r}, which is no batch norm of this model. There are: {_some(norms)}.")
    skipped = [norms[name] for name in skip]
    chosen = {name: module for name, module in norms.items() if not any(module is other for other in skipped)}
    for name, module in chosen.items():
        if module.running_mean is None or module.running_var is None:
            raise ValueError(
                f"{name or 'the model'}: running_mean is None, so its eval mode would still use batch statistics. "
                f"Build it with track_running_stats=True, or pass skip=({name!r},)."
            )
    return list(dict.fromkeys(chosen.values()))


def _check_model(model: Any, caller: str) -> nn.Module:
    """The module that is meant: the one inside DistributedDataParallel."""
    check_module(model, caller)
    inner = _torch.inside_ddp(model)
    if hasattr(inner, "_orig_mod"):
        path = "model._orig_mod" if inner is model else "model.module._orig_mod"
        raise TypeError(f"{caller} needs the module itself, not what torch.compile returned: pass {path}.")
    return inner


def _no_batch_norm(caller: str, model: nn.Module) -> str:
    return (
        f"{caller}: {type(model).__name__} has no nn.BatchNorm1d/2d/3d or nn.SyncBatchNorm, so there are no running "
        'statistics to keep. A model without batch norm can be compiled with torch.compile(backend="convbn_tune").'
    )


def _some(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return shown + (", ..." if len(names) > 5 else "")

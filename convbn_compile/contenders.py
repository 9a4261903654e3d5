"""Who takes part in a benchmark: what a user would pick in place of Tune mode, by name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

from convbn_compile import _torch
from convbn_compile._arguments import listed, shown
from convbn_compile.options import Lowering, Mode, Options

Build = Callable[[nn.Module], nn.Module]
Compile = Callable[[nn.Module], Callable[..., Any]]


def as_it_is(model: nn.Module) -> nn.Module:
    """No change."""
    return model


@dataclass(frozen=True)
class Contender:
    """One way to run a step.

    Attributes:
        name: what it is chosen by, such as tune@0.5.
        label: what tables call it.
        build: makes its network of a copy of the model in eval mode, which it may change.
        compile: makes what is called of that network; None if that is the network itself.
        backward: False if it is for inference.
    """

    name: str
    label: str
    build: Build = as_it_is
    compile: Compile | None = None
    backward: bool = True


DEFAULT = ("eager", "train", "inductor", "pytorch", "tune", "fused")
"""Those of a benchmark that names none."""

BUDGETED = {"inductor": Mode.EVAL, "tune": Mode.TUNE}
"""Which take a memory budget after an @, as the option memory_budget does."""


def contender(name: str, lowering: Lowering = Lowering.INDUCTOR) -> Contender:
    """The contender of a name.

    Args:
        name: one of NAMES; inductor and tune also with a memory budget, such as tune@0.5.
        lowering: what runs the graphs of those that torch.compile compiles.

    Raises:
        ValueError: there is none of that name, or the budget is none.

    Examples:
        >>> contender("tune@0.5").label
        'Tune, budget 0.5'
    """
    base, at, budget = name.partition("@")
    known = _known(lowering)
    if base not in known or (at and base not in BUDGETED):
        close = difflib.get_close_matches(base, known, n=1)
        hint = f"Did you mean {close[0]!r}? " if close and base not in known else ""
        raise ValueError(
            f"Unknown contender {name!r}. {hint}Known: {', '.join(known)}; {' and '.join(BUDGETED)} also with a memory "
            "budget, such as tune@0.5."
        )
    if not at:
        return known[base]
    compile_ = _ours(BUDGETED[base], lowering, memory_budget=_number_or_name(budget))
    return Contender(name, f"{known[base].label}, budget {budget}", compile=compile_)


def _number_or_name(budget: str) -> float | str:
    try:
        return float(budget)
    except ValueError:
        return budget


def _known(lowering: Lowering) -> Mapping[str, Contender]:
    eager = lowering is Lowering.AOT_EAGER
    plain: Compile = _ours(Mode.EVAL, lowering) if eager else _torch.compile_apart
    deploy = _ours(Mode.DEPLOY, lowering)
    found = (
        Contender("eager", "eager Eval"),
        Contender("train", "eager Train", nn.Module.train),
        Contender("inductor", "Inductor Eval", compile=plain),
        Contender("pytorch", "PyTorch's pass", compile=_no_pytorchs_pass if eager else _pytorchs_pass),
        Contender("tune", "Tune", compile=_ours(Mode.TUNE, lowering)),
        Contender("fused", "fused network", fused, plain),
        Contender("deploy", "Deploy, forward", _frozen, deploy, backward=False),
        Contender("checkpoint", "checkpoints, eager", checkpointed),
        Contender("checkpoint-compiled", "checkpoints, compiled", checkpointed, plain),
        Contender("memsave_torch", "memsave_torch", _memsave_torch),
        Contender("inplace_abn", "inplace_abn", _inplace_abn),
    )
    return {one.name: one for one in found}


def _ours(mode: Mode, lowering: Lowering, **options: Any) -> Compile:
    given = {"mode": mode.value, "lowering": lowering.value, **options}
    Options.parse(options=given)
    return lambda model: _torch.compile_apart(model, backend="convbn_tune", options=given)


def _pytorchs_pass(model: nn.Module) -> Callable[..., Any]:
    return _torch.compile_apart(model, options={"efficient_conv_bn_eval_fx_passes": True})


def _no_pytorchs_pass(_: nn.Module) -> Callable[..., Any]:
    raise NotImplementedError("PyTorch's pass is one of Inductor's, and lowering=\"aot_eager\" goes without it")


def _frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(requires_grad=False)


# --- networks that are built otherwise ---------------------------------------------------------------------------


def fused(model: nn.Module) -> nn.Module:
    """The network with neighbouring convolutions and norms fused by torch.nn.utils.fusion, in place: the limit.

    It has other parameters: a folded weight is trained if the convolution's was, and a folded bias if the convolution's
    was, or, where it had none, the norm's. Of timm's norms that have an activation inside, that is what stays.

    Raises:
        ValueError: a norm of some other class, of which nobody knows what else it does.
    """
    for parent in model.modules():
        last: tuple[str, nn.Conv2d] | None = None
        for name, module in parent.named_children():
            if isinstance(module, nn.BatchNorm2d) and last is not None:
                setattr(parent, last[0], _fused(last[1], module))
                setattr(parent, name, _rest_of(module))
            last = (name, module) if isinstance(module, nn.Conv2d) else None
    return model


def _rest_of(norm: nn.BatchNorm2d) -> nn.Module:
    """What a norm does behind normalising."""
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    rest = [getattr(norm, name, None) for name in ("drop", "act")]
    if not all(isinstance(module, nn.Module) for module in rest):
        raise ValueError(
            f"a {type(norm).__name__} is not fused: it is no BatchNorm2d, and what else it does is unknown"
        )
    return nn.Sequential(*rest)  # type: ignore[arg-type]


def _fused(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """A convolution with a norm folded into it."""
    found = fuse_conv_bn_eval(convolution, norm)
    bias = norm.bias if convolution.bias is None else convolution.bias
    assert found.bias is not None, "what is folded has a bias"
    found.bias.requires_grad_(bias is not None and bias.requires_grad)
    return found


class Checkpointed(nn.Module):
    """A block that keeps its inputs only, and is computed again in backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block makes of its inputs."""
        return checkpoint(self.block, *args, use_reentrant=False, **kwargs)


def checkpointed(model: nn.Module) -> nn.Module:
    """The network with torch.utils.checkpoint around its blocks, in place.

    Blocks are the smallest parts with two norms or more, such as the residual blocks of a ResNet.

    Raises:
        ValueError: no part has two norms.
    """
    if _num_norms(model) < 2:
        raise ValueError("no part of the model has two norms: there are no blocks to checkpoint")
    blocks = [(name, child) for name, child in model.named_children() if _num_norms(child) >= 2]
    for name, child in blocks:
        setattr(model, name, checkpointed(child))
    return model if blocks else Checkpointed(model)


def _num_norms(model: nn.Module) -> int:
    return sum(isinstance(module, _torch.BatchNormModule) for module in model.modules())


def _memsave_torch(model: nn.Module) -> nn.Module:
    install = "pip install git+https://github.com/plutonium-239/memsave_torch"
    converted: nn.Module = _peer("memsave_torch.nn", install).convert_to_memory_saving(model)
    return converted


def _inplace_abn(model: nn.Module) -> nn.Module:
    """Norms written over their inputs; without its activations, which would be another network than one with ReLU."""
    peer = _peer("inplace_abn", "pip install inplace_abn, which compiles an extension")
    for parent in model.modules():
        for name, module in parent.named_children():
            if isinstance(module, nn.BatchNorm2d):
                norm = peer.InPlaceABN(module.num_features, eps=module.eps, activation="identity")
                norm.load_state_dict(module.state_dict())
                setattr(parent, name, nn.Sequential(norm.eval(), _rest_of(module)))
            elif hasattr(module, "inplace"):
                setattr(module, "inplace", False)  # noqa: B010  backward of such a norm needs its output
    return model


def _peer(name: str, install: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModuleNotFoundError(f"{name.partition('.')[0]} cannot be imported ({error}): {install}") from error


NAMES: tuple[str, ...] = tuple(_known(Lowering.INDUCTOR))
"""All contenders, but for those with a memory budget."""


ALL = (*NAMES, "tune@0.99", "tune@0.5", "tune@0.25")
"""The whole field."""


def contenders(chosen: Sequence[str | Contender], lowering: Lowering = Lowering.INDUCTOR) -> tuple[Contender, ...]:
    """Contenders by name, or as they are.

    Raises:
        TypeError: `chosen` is no list, or holds what is neither a name nor a Contender.
        ValueError: a name is unknown, or given twice, or there is none.
    """
    check, example = partial(_contender, lowering=lowering), '["inductor", "tune"]'
    return listed("contenders", chosen, check, example=example, optional=False, key=attrgetter("name"))


def _contender(one: Any, lowering: Lowering) -> Contender:
    if not isinstance(one, (str, Contender)):
        raise TypeError(f"a name such as 'tune', or a Contender, is needed, got {shown(one)}.")
    return contender(one, lowering) if isinstance(one, str) else one

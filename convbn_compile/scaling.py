"""Scaling coefficients: by how much folding scales the weight of each channel, and what that does to its learning rate.

    s = gamma / sqrt(var + eps)        w' = s · w                 per output channel

    Trained through w (Eval, Tune), a step of SGD at rate η moves the folded weight by s · (-η dL/dw) = -η s² dL/dw'.
    Trained as w' (Deploy), it moves it by -η dL/dw', because dL/dw = s · dL/dw'.

So with SGD, momentum or not, Deploy trains a channel as Eval would at η/s². A step of Adam does not depend on the size
of the gradient: there it is η/|s|. Exact for as long as gamma and the statistics stay; they do not in Eval, which
trains gamma, too. Source: arXiv 2305.11624, section 3.3.2 and Figure 2.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from convbn_compile import _torch
from convbn_compile._wrapped import check_module, unwrapped
from convbn_compile.report import Refusal

SMALL, LARGE = 0.1, 10.0
"""Beyond these SGD's rate in Deploy mode differs from Eval's by more than a hundred."""

DEFAULT_EPS = 1e-5
"""torch's; and what the FrozenBatchNorm2d of transformers, which has no attribute for it, adds."""


@dataclass(frozen=True)
class NormScale:
    """The scaling coefficients of one norm, or of several.

    Attributes:
        module: the path of the norm, such as layer1.0.bn2.
        values: |gamma| / sqrt(var + eps) of each channel.
    """

    module: str
    values: tuple[float, ...]

    @property
    def channels(self) -> int:
        """How many there are."""
        return len(self.values)

    @property
    def min(self) -> float:
        """The smallest."""
        return min(self.values)

    @property
    def max(self) -> float:
        """The largest."""
        return max(self.values)

    @property
    def median(self) -> float:
        """Half of the channels are below."""
        return statistics.median(self.values)

    @property
    def below(self) -> int:
        """Channels whose scale is below SMALL."""
        return sum(value < SMALL for value in self.values)

    @property
    def above(self) -> int:
        """Channels whose scale is above LARGE."""
        return sum(value > LARGE for value in self.values)

    @property
    def zero(self) -> int:
        """Channels whose scale is 0: they are switched off."""
        return self.values.count(0)

    @property
    def sgd_rates(self) -> tuple[float, float] | None:
        """By how much Deploy multiplies SGD's learning rate, 1/s²: the least and the most, where s is not 0."""
        scales = [value for value in self.values if value > 0]
        return (max(scales) ** -2, min(scales) ** -2) if scales else None

    def to_dict(self) -> dict[str, Any]:
        """The figures, without the values of the channels, in types that JSON has."""
        names = ("module", "channels", "min", "median", "max", "below", "above", "zero")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def sum(cls, name: str, scales: Iterable[NormScale]) -> NormScale:
        """Several norms as one."""
        return cls(name, tuple(value for scale in scales for value in scale.values))


@dataclass(frozen=True)
class ScalingReport:
    """The scaling coefficients of a model's norms.

    Attributes:
        norms: those of each norm with running statistics, in the order of the modules.
        without: the norms that have none, each with its reason.
    """

    norms: tuple[NormScale, ...] = ()
    without: tuple[Refusal, ...] = ()

    @property
    def all(self) -> NormScale:
        """All channels of all norms as one."""
        return NormScale.sum("", self.norms)

    def summary(self) -> str:
        """The facts in one line."""
        parts = [f"{len(self.norms)} norms with running statistics"]
        if self.norms:
            found = self.all
            below, above = found.below / found.channels, found.above / found.channels
            parts = [
                f"{len(self.norms)} norms, {found.channels} channels",
                f"scale {found.min:.3g} to {found.max:.3g}, median {found.median:.3g}",
                f"{below:.1%} below {SMALL:g}, {above:.1%} above {LARGE:g}",
                *([f"{found.zero} of scale 0"] if found.zero else []),
            ]
        reasons = Counter(item.reason for item in self.without)
        parts += [f"{count} left out: {reason}" for reason, count in reasons.most_common()]
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The figures of each norm and of all, in types that JSON has."""
        total = {name: value for name, value in self.all.to_dict().items() if name != "module"} if self.norms else None
        return {
            "norms": [norm.to_dict() for norm in self.norms],
            "without": [{"module": item.module, "reason": item.reason} for item in self.without],
            "all": total,
        }

    def __str__(self) -> str:
        return f"{scale_table((norm.module, norm) for norm in self.norms)}\n\n{self.summary()}"


HEADERS = ("norm", "channels", "min", "median", "max", f"< {SMALL:g}", f"> {LARGE:g}", "SGD's rate in Deploy")


def scale_table(rows: Iterable[tuple[str, NormScale]]) -> str:
    """A table of names and scales."""
    align = ("left", *("right",) * (len(HEADERS) - 1))
    cells = [(name, *_cells(scale)) for name, scale in rows]
    return tabulate(cells, headers=HEADERS, disable_numparse=True, colalign=align if cells else None)


def _cells(scale: NormScale) -> tuple[str, ...]:
    rates = " to ".join(f"{rate:.2g}" for rate in scale.sgd_rates or ())
    numbers = (f"{number:.3g}" for number in (scale.min, scale.median, scale.max))
    return (str(scale.channels), *numbers, str(scale.below), str(scale.above), rates)


def scaling_coefficients(model: nn.Module) -> ScalingReport:
    """|gamma| / sqrt(var + eps), by which folding scales the weights of each channel, of every norm of a model.

    The norms are found among the modules, nothing is run: also those that do not come from a convolution are listed;
    `explain` says which are folded. A norm is an nn.BatchNorm1d/2d/3d, nn.SyncBatchNorm or subclass, or any module with
    a buffer `running_var`, such as the FrozenBatchNorm2d of torchvision, timm and transformers. Without affine
    parameters gamma is 1.

    Args:
        model: the module; paths are those in the module inside DistributedDataParallel or torch.compile. What
            fully_shard was applied to is gathered, norm by norm: call this on all ranks.

    Returns:
        The scales of each norm: small ones, and ones far apart, make training in Deploy mode unstable.

    Raises:
        TypeError: `model` is not a module, or one of TorchScript.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0))
        >>> _ = nn.init.constant_(net[1].weight, 0.5)
        >>> print(scaling_coefficients(net))
        norm      channels    min    median    max    < 0.1    > 10    SGD's rate in Deploy
        ------  ----------  -----  --------  -----  -------  ------  ----------------------
        1                4    0.5       0.5    0.5        0       0                  4 to 4
        <BLANKLINE>
        1 norms, 4 channels; scale 0.5 to 0.5, median 0.5; 0.0% below 0.1, 0.0% above 10
    """
    check_module(model, "scaling_coefficients")
    norms, without = [], []
    for name, module in unwrapped(model).named_modules():
        if not _is_norm(module):
            continue
        reason = _no_scale(module)
        if reason is None:
            norms.append(NormScale(name, tuple(_scale(module).tolist())))
        else:
            without.append(Refusal(name, reason))
    return ScalingReport(tuple(norms), tuple(without))


def _is_norm(module: nn.Module) -> bool:
    """A batch norm of torch, or what has the buffers of one."""
    if isinstance(module, _torch.BatchNormModule):
        return True
    var, weight = module._buffers.get("running_var"), getattr(module, "weight", None)
    if var is None or is_lazy(var) or var.dim() != 1:
        return False
    return weight is None or (isinstance(weight, Tensor) and weight.shape == var.shape)


def _no_scale(module: nn.Module) -> str | None:
    """Why the module has no scale to speak of, if it has none."""
    var = module._buffers.get("running_var")
    if var is None:
        return "it has no running statistics (track_running_stats=False), so its scale is another one for each batch"
    if is_lazy(var):
        return "it is not initialised yet: call the model once"
    if any(tensor.is_meta for tensor in _var_and_weight(module) if tensor is not None):
        return "its values are not loaded (meta device)"
    if not var.numel():
        return "it has no channels"
    if not isinstance(getattr(module, "eps", DEFAULT_EPS), (int, float)):
        return f"its eps is {module.eps!r}, not a number"
    if not _scale(module).isfinite().all():
        return "its weight or running_var holds values that give no finite scale"
    return None


def _scale(module: nn.Module) -> Tensor:
    """|gamma| / sqrt(var + eps), float64, [C]."""
    var, weight = (
        tensor if tensor is None else _torch.whole(tensor.detach()).cpu().double() for tensor in _var_and_weight(module)
    )
    assert var is not None, "checked by the caller"
    scale = (var + getattr(module, "eps", DEFAULT_EPS)).rsqrt()
    return scale if weight is None else (weight * scale).abs()


def _var_and_weight(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    weight = getattr(module, "weight", None)
    return module._buffers.get("running_var"), weight if isinstance(weight, Tensor) else None

"""The units of a network: what is trained by one local loss each, in order, and the network's own classifier.

A unit gets one tensor and returns one, so that it never cuts a skip connection: of a VGG it is a convolution with all
up to the next one, of a ResNet the stem or a residual block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from convbn_compile._arguments import shown
from convbn_compile._wrapped import unwrapped

MODAL = re.compile("Drop|RReLU|StochasticDepth")
"""In the names of classes without parameters or buffers that are another thing in training."""


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Unit:
    """A part of a network with a local loss of its own.

    Attributes:
        name: the path of what it begins with.
        module: from one tensor to one tensor.
    """

    name: str
    module: nn.Module


@dataclass(frozen=True)
class Units:
    """A network as its units, and a classifier behind the last.

    Attributes:
        units: in order.
        classifier: from the last unit's output to logits.
        model: the network, to compare with; None if it was given as a list.
    """

    units: tuple[Unit, ...]
    classifier: nn.Module
    model: nn.Module | None

    def __post_init__(self) -> None:
        seen: dict[object, str] = {}
        for name, module in [*((unit.name, unit.module) for unit in self.units), ("the classifier", self.classifier)]:
            for what, each in _own(module):
                if seen.setdefault(each, name) != name:
                    raise ValueError(
                        f"NeuroFlux: {name} and {seen[each]} share a {what}, and are not trained at the same time. Put "
                        "them into one unit, or give each its own."
                    )
        for unit in self.units:
            if next(unit.module.parameters(), None) is None:
                raise ValueError(
                    f"NeuroFlux: unit {unit.name} ({type(unit.module).__name__}) has no parameters, so that its loss "
                    "would train nothing. Put it into one unit with the module before it, in an nn.Sequential."
                )
            for norm in unit.module.modules():
                if isinstance(norm, BATCH_NORMS) and norm.running_mean is None:
                    raise ValueError(
                        f"NeuroFlux: unit {unit.name} has a {type(norm).__name__} without running statistics, so that "
                        "what it makes of an image depends on the images beside it, and is no input to keep. Use "
                        "track_running_stats=True."
                    )


def _own(module: nn.Module) -> Iterator[tuple[str, object]]:
    """What a unit has that no other may have: what is trained, and what has a mode."""
    for parameter in module.parameters():
        yield "parameter", parameter
    for buffer in module.buffers():
        yield "buffer", buffer
    for child in module.modules():
        if MODAL.search(type(child).__name__):
            yield type(child).__name__, child


def units_of(model: Any) -> Units:
    """Of a VGG or ResNet of torchvision or timm, or of modules in order, the last of which is the classifier.

    Raises:
        TypeError: it is none of these.
        ValueError: a model of another class; fewer than two modules; a unit without parameters, with those of another,
            or with a batch norm that has no running statistics.
    """
    if isinstance(model, nn.Sequential):
        named = model.named_modules(remove_duplicate=False)
        return replace(_given([each for each in named if each[0] and "." not in each[0]]), model=model)
    if isinstance(model, (Sequence, nn.ModuleList)) and not isinstance(model, (str, bytes)):
        return _given([(str(index), module) for index, module in enumerate(model)])
    if not isinstance(model, nn.Module):
        raise TypeError(f"NeuroFlux: model must be an nn.Module or a list of modules, got {shown(model)}.")
    model = unwrapped(model)
    for kind in type(model).__mro__:
        if (known := KNOWN.get((kind.__module__, kind.__qualname__))) is not None:
            return known(model)
    raise ValueError(
        f"NeuroFlux knows the units of VGG and ResNet of torchvision and timm, not those of {type(model).__name__}. "
        "Give the model as a list of modules, each from one tensor to one tensor, that it calls one after the other, "
        "and the classifier at the end: [stem, *blocks, classifier]."
    )


def _given(modules: Sequence[tuple[str, Any]]) -> Units:
    for name, module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"NeuroFlux: model[{name}] must be an nn.Module, got {shown(module)}.")
    if len(modules) < 2:
        raise ValueError(
            f"NeuroFlux: a model given as modules needs a unit and a classifier at least, got {len(modules)} of them."
        )
    *units, (_, classifier) = modules
    return Units(tuple(Unit(*each) for each in units), classifier, None)


def _sequence(modules: Iterable[nn.Module]) -> nn.Module:
    return nn.Sequential(*modules)


def _vgg_units(model: Any) -> tuple[Unit, ...]:
    """Of `features`: a unit begins at each convolution."""
    grouped: list[tuple[str, list[nn.Module]]] = []
    for name, module in model.features.named_children():
        if isinstance(module, nn.Conv2d) or not grouped:
            grouped.append((f"features.{name}", []))
        grouped[-1][1].append(module)
    return tuple(Unit(name, _sequence(modules)) for name, modules in grouped)


def _vgg_of_torchvision(model: Any) -> Units:
    classifier = _sequence([model.avgpool, nn.Flatten(), model.classifier])
    return Units(_vgg_units(model), classifier, model)


def _vgg_of_timm(model: Any) -> Units:
    return Units(_vgg_units(model), _sequence([model.pre_logits, model.head]), model)


def _resnet_units(model: Any, activation: str) -> tuple[Unit, ...]:
    stem = Unit("stem", _sequence([model.conv1, model.bn1, getattr(model, activation), model.maxpool]))
    stages = ((name, child) for name, child in model.named_children() if name.startswith("layer"))
    blocks = (Unit(f"{name}.{index}", block) for name, stage in stages for index, block in stage.named_children())
    return (stem, *blocks)


def _resnet_of_torchvision(model: Any) -> Units:
    return Units(_resnet_units(model, "relu"), _sequence([model.avgpool, nn.Flatten(), model.fc]), model)


def _resnet_of_timm(model: Any) -> Units:
    classifier = _sequence([model.global_pool, nn.Dropout(model.drop_rate), model.fc])
    return Units(_resnet_units(model, "act1"), classifier, model)


KNOWN: dict[tuple[str, str], Callable[[Any], Units]] = {
    ("torchvision.models.vgg", "VGG"): _vgg_of_torchvision,
    ("torchvision.models.resnet", "ResNet"): _resnet_of_torchvision,
    ("timm.models.vgg", "VGG"): _vgg_of_timm,
    ("timm.models.resnet", "ResNet"): _resnet_of_timm,
}
"""By the module and the name of the network's class, or of one that it inherits from."""

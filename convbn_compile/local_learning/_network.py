"""A network as units with heads, built for images of one shape, and compared with the model that it was taken from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convbn_compile.local_learning._heads import auxiliary_head
from convbn_compile.local_learning._local import LocalUnit, keeping_modes, seeded
from convbn_compile.local_learning._units import Units

RTOL, ATOL = 1e-4, 1e-5
"""By how much a model may differ from its units one after the other; another kernel for the same is no difference."""


@dataclass(frozen=True)
class Network:
    """Units with heads.

    Attributes:
        units: in order; the head of the last is the network's own classifier.
        input_shape: of an image.
        shapes: of the units' outputs for one image.
    """

    units: tuple[LocalUnit, ...]
    input_shape: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def like(self) -> Tensor:
        """A parameter; all are of its dtype, and on its device between runs."""
        return next(self.units[0].parameters())

    def until(self, index: int) -> nn.Sequential:
        """The network that ends at a unit, with its head."""
        *before, last = self.units[: index + 1]
        return nn.Sequential(*(unit.unit for unit in before), last.unit, last.head)


def built(
    units: Units, example: Tensor, num_classes: int, head_filters: int | None, options: Mapping[str, Any], seed: int
) -> Network:
    """Give units their heads.

    Args:
        units: of the network.
        example: images [N, C, H, W].
        num_classes: of the classifier.
        head_filters: of every head; None for adaptive ones.
        options: of torch.compile.
        seed: of the heads' values.

    Raises:
        ValueError: the units do not take the images, do not return tensors, or are not what the model computes; the
            classifier has another number of outputs.
    """
    shapes = _traced(units, example, num_classes)

    def head(shape: tuple[int, ...], unit: nn.Module) -> nn.Module:
        like = next(unit.parameters())
        return auxiliary_head(shape, num_classes, head_filters).to(like.device, like.dtype)

    with seeded(torch.device("cpu"), seed):
        pairs = list(zip(units.units, shapes, strict=True))
        heads = [_naming(f"unit {unit.name}", head, shape, unit.module) for unit, shape in pairs[:-1]]
    local = [LocalUnit(unit, each, options) for unit, each in zip(units.units, [*heads, units.classifier], strict=True)]
    for unit in local:
        unit.check()
    return Network(tuple(local), tuple(example.shape[1:]), tuple(shapes))


@torch.no_grad()
def _traced(units: Units, example: Tensor, num_classes: int) -> list[tuple[int, ...]]:
    """Shapes of the units' outputs for one image."""
    modules = [unit.module for unit in units.units]
    like = next(modules[0].parameters())
    images, shapes = example[:2].to(like.device), []
    whole = nn.Sequential(*modules, units.classifier)
    with keeping_modes(whole):
        whole.eval()
        value = images.clone()
        for unit in units.units:
            there = next(unit.module.parameters()).device
            value = _naming(f"unit {unit.name}", unit.module, value.to(there))
            if not isinstance(value, Tensor):
                raise ValueError(f"unit {unit.name} returns {type(value).__name__}; a unit has to return a tensor.")
            if value.dtype != like.dtype:
                raise ValueError(
                    f"unit {unit.name} returns {value.dtype}; a network has to be of one dtype, here {like.dtype}."
                )
            shapes.append(tuple(value.shape[1:]))
        logits = _naming("the classifier", units.classifier, value).to(images.device)
    if logits.shape != (len(images), num_classes):
        raise ValueError(
            f"num_classes = {num_classes}, but the network returns {list(logits.shape)} for {len(images)} images: give "
            "it a classifier with as many outputs."
        )
    if units.model is not None:
        _compare(units.model, images, logits)
    return shapes


def _naming(what: str, call: Callable[..., Any], *args: Any) -> Any:
    """What a call returns; its errors say what was called."""
    try:
        return call(*args)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"{what}: {error}") from error


def _compare(model: nn.Module, images: Tensor, logits: Tensor) -> None:
    with keeping_modes(model):
        same = torch.allclose(logits, model.eval()(images), rtol=RTOL, atol=ATOL, equal_nan=True)
    if not same:
        raise ValueError(
            f"NeuroFlux: {type(model).__name__} computes something else than its units one after the other, so its "
            "forward must be another one than its class has. Give what it calls one after the other as a list of "
            "modules, the classifier last."
        )

"""Gradients of a model for one batch, which leaves no trace in it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convbn_compile import _torch


def gradients(model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Of all trained parameters that the model reads, for a random cotangent that is the same in every call.

    Raises:
        ValueError: no parameter is trained.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("gradient_error needs a parameter that requires grad, and the model has none.")
    devices = {parameter.device for parameter in parameters if parameter.device.type == "cuda"}
    with _buffers_kept(model), torch.random.fork_rng(devices), torch.enable_grad():
        outputs = [tensor for tensor in _torch.tensors_in(model(*inputs, **kwargs)) if tensor.requires_grad]
        torch.manual_seed(0)
        cotangents = [torch.randn_like(tensor) for tensor in outputs]
        found = torch.autograd.grad(outputs, parameters, cotangents, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Inside, buffers are copies: what is written is gone afterwards, and graphs that hold the others stay good."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            for name, buffer in module._buffers.items():
                stack.callback(module._buffers.__setitem__, name, buffer)
                module._buffers[name] = None if buffer is None else buffer.clone()
        yield


def relative_difference(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """‖found - wanted‖ / ‖wanted‖ of all together; 0 if both are 0."""
    difference = norm([other - one for one, other in zip(wanted, found, strict=True)])
    return difference / norm(wanted) if difference else 0.0


def norm(tensors: Sequence[Tensor]) -> float:
    """‖all together‖, in float64."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))

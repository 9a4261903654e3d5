"""Gradients of a model for one batch, which leaves no trace in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convbn_compile import _torch


def gradients(model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Of all trained parameters, for a random cotangent that is the same in every call."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng(), torch.enable_grad():
        outputs = [tensor for tensor in _torch.tensors_in(model(*inputs, **kwargs)) if tensor.requires_grad]
        torch.manual_seed(0)
        cotangents = [torch.randn_like(tensor) for tensor in outputs]
        found = torch.autograd.grad(outputs, parameters, cotangents, allow_unused=True)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return [gradient for gradient in found if gradient is not None]


def relative_difference(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """‖found - wanted‖ / ‖wanted‖ of all together."""
    pairs = zip(wanted, found, strict=True)
    difference = sum(float((one - other).double().square().sum()) for one, other in pairs)
    return math.sqrt(difference / sum(float(one.double().square().sum()) for one in wanted))

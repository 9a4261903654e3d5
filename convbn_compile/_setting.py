"""Setting: a batch size, a resolution and a dtype of a benchmark."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convbn_compile import _torch
from convbn_compile._arguments import shown


@dataclass(frozen=True)
class Setting:
    """A batch size, a resolution and a dtype; None leaves the inputs as they are."""

    batch: int | None
    size: int | None
    dtype: str

    @property
    def autocast(self) -> torch.dtype | None:
        """What to cast to, if the model stays in float32."""
        return dtype_of(self.dtype) if self.dtype.startswith(AUTOCAST) else None

    def __str__(self) -> str:
        named = {"batch": self.batch, "size": self.size, "": self.dtype}
        return "".join(f"{name} {value}, ".lstrip() for name, value in named.items() if value is not None)

    def model(self, model: nn.Module) -> nn.Module:
        """A copy in eval mode, without gradients."""
        copied = copy.deepcopy(model).eval()
        copied.zero_grad()
        return copied.to(torch.float32 if self.autocast else dtype_of(self.dtype))

    def inputs(self, inputs: Any) -> Any:
        """Inputs like these: normal numbers, or, of integers and booleans, zeros and ones."""
        dtype = torch.float32 if self.autocast else dtype_of(self.dtype)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return _torch.map_tensors(lambda tensor: self._like(tensor, dtype), inputs)

    def measures(self, inputs: Any) -> tuple[int, int | None]:
        """The batch size, and the last dimension of the first input that has three or more."""
        shapes = [tensor.shape for tensor in _torch.tensors_in(inputs)]
        batch = self.batch or next((shape[0] for shape in shapes if shape), 1)
        return batch, next((self.size or shape[-1] for shape in shapes if len(shape) > 2), None)

    def _like(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        shape = list(tensor.shape)
        if shape and self.batch is not None:
            shape[0] = self.batch
        if len(shape) > 2 and self.size is not None:
            shape[2:] = [self.size] * len(shape[2:])
        if tensor.is_floating_point():
            return torch.randn(shape).to(tensor.device, dtype).requires_grad_(tensor.requires_grad)
        return torch.randint(0, 2, shape).to(tensor.device, tensor.dtype)


AUTOCAST = "autocast-"
AUTOCASTS = (torch.bfloat16, torch.float16)


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name.

    Raises:
        TypeError: it is no name.
        ValueError: there is none of that name, it is not floating-point, or autocast does not cast to it.
    """
    if not isinstance(name, str):
        raise TypeError(f"a name such as 'float32' is needed, got {shown(name)}.")
    dtype = getattr(torch, name.removeprefix(AUTOCAST), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"Unknown dtype {name!r}. Known: float32, bfloat16, float16, float64, {AUTOCAST}bfloat16.")
    if name.startswith(AUTOCAST) and dtype not in AUTOCASTS:
        raise ValueError(f"torch.autocast casts to bfloat16 and float16 only, got {name!r}. Try {AUTOCAST}bfloat16.")
    return dtype


def casts(name: str) -> tuple[torch.dtype, bool]:
    """What a name comes to: the dtype, and whether autocast casts to it."""
    return dtype_of(name), name.startswith(AUTOCAST)


def known_dtype(name: Any) -> str:
    """The name itself, if dtype_of knows it."""
    dtype_of(name)
    return str(name)

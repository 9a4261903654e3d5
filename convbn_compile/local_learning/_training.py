"""How blocks are trained, and where it is told."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from convbn_compile._extras import require
from convbn_compile.local_learning._local import Optimizer

logger = logging.getLogger("convbn_compile.local_learning")


@dataclass(frozen=True)
class Training:
    """How blocks are trained.

    Attributes:
        optimizer: makes one for a unit.
        lr_batch_size: the batch that its learning rate is for.
        epochs: of each block.
        seed: of everything random.
        cache: "auto", "always" or "never".
        cache_dtype: float32 or float16.
        device: where blocks are trained.
    """

    optimizer: Optimizer
    lr_batch_size: int
    epochs: int
    seed: int
    cache: str
    cache_dtype: torch.dtype
    device: torch.device


def progress_bar(total: int, what: str, *, show: bool, initial: int = 0) -> Any:
    """On a terminal, if it is to be shown at all."""
    tqdm = require("tqdm", extra="local-learning").tqdm
    return tqdm(total=total, desc=what, initial=initial, leave=False, disable=None if show else True)

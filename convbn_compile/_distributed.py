"""What torch.distributed keeps out of the graphs: sharded modules of torch.nn, and batch norms that synchronise."""

from __future__ import annotations

import warnings

import torch.distributed
from torch import nn

from convbn_compile import _torch
from convbn_compile.report import Refusal


def warn_of_sharded_containers(model: nn.Module, caller: str) -> None:
    """Warn if fully_shard was applied to a module of torch.nn that runs batch norms or convolutions.

    FSDP's hooks break the graph before and after such a module, and what runs in between is torch.nn's own code, which
    Dynamo does not compile as a frame of its own (torch 2.13; pytorch/pytorch#111966).
    """
    paths = [path for path, module in model.named_modules() if _torch.is_fully_sharded(module) and _uncompiled(module)]
    if paths:
        names = ", ".join(path or "the model itself" for path in paths[:5]) + (", ..." if len(paths) > 5 else "")
        warnings.warn(
            f"{caller}: fully_shard was applied to modules of torch.nn itself: {names}. torch.compile does not compile "
            "what they run, so that their batch norms are not folded. Apply fully_shard to modules of your own "
            "classes, which define forward, that hold convolution and norm together.",
            stacklevel=3,
        )


def _uncompiled(module: nn.Module) -> bool:
    """True if there is a batch norm or convolution that only torch.nn's own code leads to."""
    if not _torch.is_of_torch_nn(module):
        return False
    kinds = (_torch.BatchNormModule, _torch.ConvolutionModule)
    return isinstance(module, kinds) or any(map(_uncompiled, module.children()))


def synchronised(model: nn.Module) -> tuple[Refusal, ...]:
    """The nn.SyncBatchNorm that run on batch statistics of all processes: Dynamo has them in no graph."""
    reason = "it runs on batch statistics (training mode), which nn.SyncBatchNorm gathers outside the graph"
    return tuple(Refusal(path, reason) for path, module in model.named_modules() if _synchronises(module))


def _synchronises(module: nn.Module) -> bool:
    if not isinstance(module, nn.SyncBatchNorm) or not module.training:
        return False
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed and torch.distributed.get_world_size(module.process_group) > 1

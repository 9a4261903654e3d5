"""What torch.distributed keeps out of the graphs: sharded modules of torch.nn, and batch norms that synchronise."""

from __future__ import annotations

import warnings

import torch.distributed
from torch import nn

from convbn_compile import _torch
from convbn_compile.report import Refusal


def warn_of_sharded_containers(model: nn.Module, caller: str, *, stacklevel: int = 3) -> None:
    """Warn if fully_shard was applied to a module of torch.nn that runs batch norms or convolutions.

    FSDP's hooks break the graph before and after such a module, and what runs in between is torch.nn's own code, which
    Dynamo does not compile as a frame of its own (torch 2.13; pytorch/pytorch#111966).

    Args:
        model: the module.
        caller: the public function that warns.
        stacklevel: as warnings.warn has it; 3 if the public function calls this itself.
    """
    paths = [path for path, module in _sharded(model) if _uncompiled(module)]
    if paths:
        names = ", ".join(path or "the model itself" for path in paths[:5]) + (", ..." if len(paths) > 5 else "")
        warnings.warn(
            f"{caller}: fully_shard was applied to modules of torch.nn itself: {names}. torch.compile does not compile "
            "what they run, so that their batch norms are not folded. Apply fully_shard to modules of your own "
            "classes, which define forward, that hold convolution and norm together.",
            stacklevel=stacklevel,
        )


def _sharded(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that fully_shard was applied to, each with its path."""
    return [(path, module) for path, module in model.named_modules() if _torch.is_fully_sharded(module)]


def _uncompiled(module: nn.Module) -> list[nn.Module]:
    """The batch norms and convolutions that only torch.nn's own code leads to."""
    if not _torch.is_of_torch_nn(module):
        return []
    kinds = (_torch.BatchNormModule, _torch.ConvolutionModule)
    itself = [module] if isinstance(module, kinds) else []
    return itself + [part for child in module.children() for part in _uncompiled(child)]


def in_no_graph(model: nn.Module) -> tuple[Refusal, ...]:
    """The batch norms that Dynamo has in no graph.

    nn.SyncBatchNorm on batch statistics of all processes, and what is in sharded modules of torch.nn.
    """
    synchronises = "it runs on batch statistics (training mode), which nn.SyncBatchNorm gathers outside the graph"
    sharded = "torch.compile does not compile it: fully_shard was applied to a module of torch.nn itself"
    uncompiled = {part for _, module in _sharded(model) for part in _uncompiled(module)}
    norms = [(path, module) for path, module in model.named_modules() if isinstance(module, _torch.BatchNormModule)]
    return tuple(
        Refusal(path, sharded if norm in uncompiled else synchronises)
        for path, norm in norms
        if norm in uncompiled or _synchronises(norm)
    )


def _synchronises(module: nn.Module) -> bool:
    if not isinstance(module, nn.SyncBatchNorm) or not module.training:
        return False
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed and torch.distributed.get_world_size(module.process_group) > 1

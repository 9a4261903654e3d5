"""attach: a frozen network that a small side network adapts, in place."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from torch import nn

from convbn_compile import _torch
from convbn_compile._arguments import count as natural
from convbn_compile._arguments import located, shown
from convbn_compile._wrapped import check_module, unwrapped
from convbn_compile.side_tuning._backbone import SIDE
from convbn_compile.side_tuning._blocks import blocks_of
from convbn_compile.side_tuning._head import head_of
from convbn_compile.side_tuning._side_network import Settings
from convbn_compile.side_tuning.handle import HANDLE, SideTuned

logger = logging.getLogger("convbn_compile")

MIDDLE = "middle"


def attach(
    model: nn.Module,
    rank: int = 2,
    start: int | str = MIDDLE,
    plus: bool = False,  # noqa: FBT001, FBT002  the interface of the method
    kernel_size: int = 5,
    blocks: Iterable[Any] | None = None,
    swish_beta: float = 100.0,
    *,
    head: str | Iterable[str] | None = None,
) -> SideTuned:
    """Freeze a pretrained network and adapt it by a Compact Side Network, whose backward leaves out its first blocks.

    Disentangled Transfer Learning (DTL, DTL+; AAAI 2024). In place: the backbone's parameters keep their names, and
    require no grad; norms with running statistics stay in eval mode through train(). Trained are the side network,
    which becomes the child `side_network` of the model, and the head. Before training the model computes what it did.

    Args:
        model: a ViT, Swin, SwinV2, ConvNeXt, ResNet, ResNeXt or RegNet of timm or torchvision, or timm's Eva or Beit,
            with a head for the task; any other with `blocks`.
        rank: d' of the taps; 2 for ViT, 4 for Swin in the paper.
        start: M, the first block whose output is adapted, from 0; "middle" is half of the blocks. Blocks before it run
            without a graph, so that memory falls with it.
        plus: DTL+, with a depthwise convolution for each stage.
        kernel_size: of the convolutions, odd.
        blocks: for each stage the path of a module whose children are its blocks, such as "layer3", or the paths of its
            blocks, each a function of one tensor, of its shape, with others to follow. None: all of known classes.
        swish_beta: β of θ(u) = u σ(β u).
        head: the path of the head, or paths, [] for none. None: the classifier of timm, or the last linear layer. What
            else is to be trained behind the blocks that are frozen, such as norms, is named here, too.

    Returns:
        The handle.

    Raises:
        TypeError: `model` is not a module; arguments of the wrong type.
        ValueError: no blocks are found; `start` is out of range; an even `kernel_size`; a `rank` not below the width of
            what is tapped; the model is side-tuned already, or inside of DistributedDataParallel; a block has hooks;
            DTL+ of a ViT whose grid of patches changes; a `head` that is frozen, or of integers.

    Examples:
        >>> net = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)), nn.Linear(8, 3))
        >>> handle = attach(net, blocks=[["0", "1", "2", "3"]])
        >>> sum(parameter.numel() for parameter in handle.side_network.parameters())
        128
        >>> len(list(handle.parameters())), handle.start
        (10, 2)
    """
    check_module(model, "attach")
    inner = unwrapped(model)
    if _torch.inside_ddp(getattr(model, "_orig_mod", model)) is not getattr(model, "_orig_mod", model):
        raise ValueError(
            "attach: DistributedDataParallel would not know the parameters of the side network. Attach first, wrap "
            "afterwards."
        )
    if HANDLE in inner.__dict__:
        raise ValueError("attach: the model is side-tuned already. Call detach() of its handle first.")
    if hasattr(inner, SIDE):
        raise ValueError(f"attach: the model has an attribute {SIDE}, whose place the side network would take.")
    found = blocks_of(inner, blocks)
    if start == MIDDLE:
        start = len(found) // 2
    settings = _settings(rank, start, plus, kernel_size, swish_beta)
    handle = SideTuned(inner, found, settings, head_of(inner, found, head))
    logger.info("attach: %s", handle)
    return handle


def _settings(rank: Any, start: Any, plus: Any, kernel_size: Any, swish_beta: Any) -> Settings:
    rank, kernel_size = located("rank", natural, rank), located("kernel_size", natural, kernel_size)
    if isinstance(start, bool) or not isinstance(start, Integral):
        raise TypeError(f'start must be the number of a block or "middle", got {shown(start)}.')
    if not isinstance(plus, bool):
        raise TypeError(f"plus must be True or False, got {shown(plus)}.")
    if not kernel_size % 2:
        raise ValueError(f"kernel_size must be odd, so that what is convolved keeps its place, got {kernel_size}.")
    if isinstance(swish_beta, bool) or not isinstance(swish_beta, Real):
        raise TypeError(f"swish_beta must be a number, got {shown(swish_beta)}.")
    if not 0 < float(swish_beta) < float("inf"):
        raise ValueError(f"swish_beta must be finite and above 0, got {swish_beta}.")
    return Settings(rank, int(start), plus, kernel_size, float(swish_beta))

"""attach: a frozen network that a small side network adapts, in place, and the handle to both."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import groupby
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from convbn_compile._arguments import count as natural
from convbn_compile._arguments import located, shown
from convbn_compile._wrapped import check_module, unwrapped
from convbn_compile.side_tuning._backbone import SIDE, Frozen, fingerprint, head_of
from convbn_compile.side_tuning._blocks import Block, blocks_of, first_adapted, grid_of, widths
from convbn_compile.side_tuning._installed import Installed
from convbn_compile.side_tuning._side_network import Settings, SideNetwork

logger = logging.getLogger("convbn_compile")

MIDDLE = "middle"
_HANDLE = "_convbn_side_tuned"


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
    require no grad; its batch norms stay in eval mode through train(). Trained are the side network, which becomes the
    child `side_network` of the model, and the head. Before training the model computes what it did.

    Args:
        model: a ViT, Swin, ConvNeXt, ResNet, ResNeXt or RegNet of timm or torchvision, with a head for the task; any
            other with `blocks`.
        rank: d' of the taps; 2 for ViT, 4 for Swin in the paper.
        start: M, the first block whose output is adapted, from 0; "middle" is half of the blocks. Blocks before it run
            without a graph, so that memory falls with it.
        plus: DTL+, with a depthwise convolution for each stage.
        kernel_size: of the convolutions, odd.
        blocks: for each stage the path of a module whose children are its blocks, such as "layer3", or the paths of its
            blocks, each a function of one tensor, of its shape. None: all that are of known classes.
        swish_beta: β of θ(u) = u σ(β u).
        head: the path of the head, or paths. None: the classifier of timm, or the last linear layer behind the blocks.

    Returns:
        The handle.

    Raises:
        TypeError: `model` is not a module; arguments of the wrong type.
        ValueError: no blocks are found; `start` is out of range; an even `kernel_size`; a `rank` not below the width of
            what is tapped; the model is side-tuned already; a block has hooks.

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
    if _HANDLE in inner.__dict__:
        raise ValueError("attach: the model is side-tuned already. Call detach() of its handle first.")
    if SIDE in inner._modules:
        raise ValueError(f"attach: the model has a child {SIDE}, whose place the side network would take.")
    found = blocks_of(inner, blocks)
    if start == MIDDLE:
        start = len(found) // 2
    settings = _settings(rank, start, plus, kernel_size, swish_beta)
    handle = SideTuned(inner, found, settings, head_of(inner, found, head))
    logger.info("attach: %s", handle)
    return handle


def _settings(rank: Any, start: Any, plus: Any, kernel_size: Any, swish_beta: Any) -> Settings:
    located("rank", natural, rank)
    if isinstance(start, bool) or not isinstance(start, int):
        raise TypeError(f'start must be the number of a block or "middle", got {shown(start)}.')
    if not isinstance(plus, bool):
        raise TypeError(f"plus must be True or False, got {shown(plus)}.")
    if not located("kernel_size", natural, kernel_size) % 2:
        raise ValueError(f"kernel_size must be odd, so that what is convolved keeps its place, got {kernel_size}.")
    if isinstance(swish_beta, bool) or not isinstance(swish_beta, (int, float)):
        raise TypeError(f"swish_beta must be a number, got {shown(swish_beta)}.")
    if not 0 < swish_beta < float("inf"):
        raise ValueError(f"swish_beta must be finite and above 0, got {swish_beta}.")
    return Settings(rank, start, plus, kernel_size, float(swish_beta))


class SideTuned:
    """The handle of a side-tuned network.

    Attributes:
        model: the module.
        side_network: its taps and convolutions.
        settings: rank, start, plus, kernel_size, swish_beta.
        head: the paths of the head's modules.
        blocks: the paths of all blocks.
        all_blocks: what is known of them.
    """

    def __init__(self, model: nn.Module, blocks: list[Block], settings: Settings, head: list[str]) -> None:
        tapped = widths(blocks, settings.start)
        for width in tapped:
            if settings.rank >= width.channels:
                raise ValueError(
                    f"rank must be below the width of what is tapped, and {blocks[width.block].path} has "
                    f"{width.channels} channels, got {settings.rank}."
                )
        self.model, self.settings, self.head = model, settings, tuple(head)
        self.blocks = tuple(block.path for block in blocks)
        self.side_network = _like(model, SideNetwork(settings, tapped, grid_of(model)))
        self.all_blocks = blocks
        self._frozen = Frozen(model, head)
        self._installed = Installed(blocks, first_adapted(blocks, settings.start), [self.side_network])
        model.add_module(SIDE, self.side_network)
        model.__dict__[_HANDLE] = self

    @property
    def start(self) -> int:
        """M."""
        return self.settings.start

    @property
    def attached(self) -> bool:
        """False after detach()."""
        return self.model.__dict__.get(_HANDLE) is self

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the side network and the head: for the optimizer."""
        return iter(dict(self._named_parameters()).values())

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for path in (SIDE, *self.head):
            for name, parameter in self.model.get_submodule(path).named_parameters():
                yield f"{path}.{name}", parameter

    def state_dict(self) -> dict[str, Any]:
        """What was trained, and what it was trained on: kilobytes.

        Returns:
            "tensors" of the side network and the head by their names in the model, "settings" of attach, the paths of
            "blocks", and "backbone", a fingerprint of its values. torch.load reads it with weights_only=True.
        """
        tensors = {
            f"{path}.{name}": tensor
            for path in (SIDE, *self.head)
            for name, tensor in self.model.get_submodule(path).state_dict().items()
        }
        return {"tensors": tensors, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what state_dict returned, into a network with the same backbone and settings.

        Args:
            state: of state_dict.

        Raises:
            ValueError: it is no state of a side-tuned network, or that of another backbone, of other settings, or has
                tensors of other names or shapes.
        """
        own = self.state_dict()
        if not isinstance(state, Mapping) or state.keys() != own.keys():
            raise ValueError(f"The state of a side-tuned network has {sorted(own)}, got {_keys(state)}.")
        for what in ("settings", "blocks", "backbone"):
            if state[what] != own[what]:
                raise ValueError(
                    f"The side network was trained on another network: its {what} are {state[what]!r}, here they are "
                    f"{own[what]!r}. {REMEDY[what]}"
                )
        tensors = state["tensors"]
        shapes, wanted = ({name: tuple(each.shape) for name, each in one.items()} for one in (tensors, own["tensors"]))
        if shapes != wanted:
            names = [name for name in {**shapes, **wanted} if shapes.get(name) != wanted.get(name)]
            raise ValueError(
                f"{names[0]}: a tensor of shape {wanted.get(names[0])} is needed, got {shapes.get(names[0])}."
            )
        with torch.no_grad():
            for name, tensor in own["tensors"].items():
                tensor.copy_(tensors[name])

    def _identity(self) -> dict[str, Any]:
        backbone = fingerprint(self.model, (SIDE, *self.head))
        return {"settings": asdict(self.settings), "blocks": list(self.blocks), "backbone": backbone}

    def detach(self) -> nn.Module:
        """Give the model back as it was, in place, with the head that it has now.

        Returns:
            The model.
        """
        if self.attached:
            self.take_off()
            self._frozen.release()
        return self.model

    def take_off(self) -> None:
        """Take the side network off a model that stays frozen."""
        self._installed.remove()
        del self.model._modules[SIDE]
        del self.model.__dict__[_HANDLE]

    def __str__(self) -> str:
        tapped, start = self.side_network.taps_block, self._installed.adapted
        rows = []
        for _, members in groupby(self.all_blocks, lambda block: block.stage):
            stage = list(members)
            taps = [block for block in stage if tapped(block.index)]
            weights = [self.side_network.taps[str(block.index)] for block in taps]
            conv = self.side_network.convs
            weights += [conv[str(stage[0].stage)]] if str(stage[0].stage) in conv else []
            numbers = sum(parameter.numel() for module in weights for parameter in module.parameters())
            adapted = sum(block.index >= start for block in taps)
            rows.append([f"{stage[0].path} to {stage[-1].path}", len(stage), len(taps), adapted, f"{numbers:,}"])
        name = "DTL+" if self.settings.plus else "DTL"
        title = f"{name} of rank {self.settings.rank} from block {self.start} of {len(self.blocks)}"
        return f"{title}\n{tabulate(rows, headers=('stage', 'blocks', 'tapped', 'adapted', 'parameters'))}"


REMEDY = {
    "settings": "Call attach with those.",
    "blocks": "Load it into a network of the same architecture, and call attach with the same blocks.",
    "backbone": "Load the weights, in the dtype, that it was trained on; a classifier does not count.",
}


def _keys(state: Any) -> Any:
    return sorted(map(str, state)) if isinstance(state, Mapping) else shown(state)


def _like(model: nn.Module, side: SideNetwork) -> SideNetwork:
    """On the device and in the dtype of the model."""
    first = next((each for each in model.parameters() if each.is_floating_point()), None)
    return side if first is None else side.to(first.device, first.dtype)


def handle_of(model: nn.Module) -> SideTuned:
    """The handle of a side-tuned model, such as a copy of one, which has its own.

    Args:
        model: what attach was called on, or a copy of it.

    Raises:
        ValueError: the model is not side-tuned.
    """
    handle = unwrapped(model).__dict__.get(_HANDLE)
    if handle is None:
        raise ValueError("handle_of: the model is not side-tuned. attach(model) makes it so, and returns its handle.")
    return handle  # type: ignore[no-any-return]

"""share_backbone: several tasks of one frozen network in one pass, which computes what they have in common once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from convbn_compile.side_tuning._alike import difference
from convbn_compile.side_tuning._backbone import SIDE
from convbn_compile.side_tuning._global_conv import GlobalConv, grid_of
from convbn_compile.side_tuning._installed import Installed
from convbn_compile.side_tuning._side_network import SideNetwork
from convbn_compile.side_tuning.handle import SideTuned


class SideNetworks(nn.ModuleList):
    """Of the tasks; as a module it hands on what it is called with, as SideNetwork."""

    def forward(self, input: Any) -> Any:
        """The same."""
        return input


class Heads(nn.ModuleList):
    """Of the tasks: each gets its part of the batch."""

    def forward(self, input: Tensor) -> tuple[Any, ...]:
        """What each makes of its part."""
        return tuple(head(part) for head, part in zip(self, input.chunk(len(self)), strict=True))


def share_backbone(handles: Sequence[SideTuned]) -> nn.Module:
    """One network for several tasks that were side-tuned on the same backbone.

    Blocks up to the first that a task adapts run once, for all; those behind it run on a batch with a part for each
    task (DTL's multi-task inference; AAAI 2024). The modules are copies with the parameters and buffers of the models:
    train() and eval() of the one leave the others as they are, but to(), float() and the like move the parameters of
    all. Heads are what the models end with. Of what blocks get besides features, nothing is repeated for the tasks.

    Args:
        handles: of attach; starts, ranks and heads may differ.

    Returns:
        A module that is called as the models are, and returns a tuple: what each of them returns.

    Raises:
        TypeError: it is no list of handles.
        ValueError: there are less than two; backbones or blocks differ, in weights or in what modules do; a model has
            no head or several, or one that is elsewhere.

    Examples:
        >>> import torch
        >>> from convbn_compile.side_tuning import attach
        >>> first = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)), nn.Linear(8, 3))
        >>> second = copy.deepcopy(first)
        >>> second[4] = nn.Linear(8, 5)
        >>> both = share_backbone([attach(model, blocks=[["0", "1", "2", "3"]]) for model in (first, second)])
        >>> [tuple(output.shape) for output in both(torch.randn(2, 8))]
        [(2, 3), (2, 5)]
    """
    _check(handles)
    twins = [_twin(handle) for handle in handles]
    model, (head,) = twins[0].model, twins[0].head
    sides = [twin.side_network for twin in twins]
    _share_grid(model, sides)
    model.set_submodule(head, Heads([twin.model.get_submodule(head) for twin in twins]))
    model.add_module(SIDE, SideNetworks(sides))
    Installed(model, twins[0].all_blocks, min(handle.adapted for handle in handles), sides)
    return model


def _twin(handle: SideTuned) -> SideTuned:
    """Of a copy of the model with the same tensors, frozen, that the side network was taken off."""
    tensors = [*handle.model.parameters(), *handle.model.buffers()]
    twin = copy.deepcopy(handle, {id(tensor): tensor for tensor in tensors})
    twin.take_off()
    return twin


def _share_grid(model: nn.Module, sides: Sequence[SideNetwork]) -> None:
    """Convolutions ask the shared model for its grid of patches, as it is when it runs."""
    convs = [conv for side in sides for conv in side.convs.values() if isinstance(conv, GlobalConv)]
    grid = grid_of(model) if convs else None
    for conv in convs:
        conv.grid = grid


def _check(handles: Any) -> None:
    listed = isinstance(handles, Sequence) and all(isinstance(handle, SideTuned) for handle in handles)
    if not listed:
        raise TypeError(f"share_backbone needs a list of what attach returned, got {handles!r}.")
    if len(handles) < 2:
        raise ValueError(f"share_backbone needs two handles or more, got {len(handles)}.")
    first, common = handles[0], ""
    for number, handle in enumerate(handles):
        if not handle.attached:
            raise ValueError(f"share_backbone: handles[{number}] was detached.")
        if len(handle.head) != 1 or handle.head != first.head:
            raise ValueError(
                f"share_backbone: each model needs one head, in the same place. That of handles[0] is {first.head}, "
                f"that of handles[{number}] {handle.head}."
            )
        if handle.blocks != first.blocks:
            raise ValueError(f"share_backbone: the models of handles[0] and handles[{number}] have other blocks.")
        differs = difference(first.model, handle.model, (SIDE, *first.head))
        if differs:
            raise ValueError(
                f"share_backbone: the models of handles[0] and handles[{number}] compute different things: {differs}."
            )
        found = handle.fingerprint()
        common = common or found
        if found != common:
            raise ValueError(
                f"share_backbone: the backbones of handles[0] and handles[{number}] have other weights, so that they "
                "have nothing in common to compute once."
            )

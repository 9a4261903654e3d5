"""The handle of a side-tuned network: what is trained, what is kept of it, and the way back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from convbn_compile._wrapped import unwrapped
from convbn_compile.side_tuning._backbone import SIDE, Frozen
from convbn_compile.side_tuning._blocks import Block
from convbn_compile.side_tuning._fingerprint import fingerprint
from convbn_compile.side_tuning._global_conv import grid_of
from convbn_compile.side_tuning._head import check_head
from convbn_compile.side_tuning._installed import Installed
from convbn_compile.side_tuning._side_network import Settings, SideNetwork
from convbn_compile.side_tuning._state import check_tensors, load
from convbn_compile.side_tuning._table import table
from convbn_compile.side_tuning._widths import check_rank, first_adapted, widths

HANDLE = "_convbn_side_tuned"
"""Where a model has its handle, in its __dict__."""


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
        adapted = first_adapted(blocks, settings.start)
        check_rank(settings.rank, blocks, tapped)
        check_head(model, head, blocks[: adapted + 1])
        self.model, self.settings, self.head = model, settings, tuple(head)
        self.blocks, self.all_blocks = tuple(block.path for block in blocks), blocks
        self.side_network = SideNetwork(settings, tapped, grid_of(model) if settings.plus else None)
        self.side_network.train(model.training)
        self._frozen = Frozen(model, head)
        model.add_module(SIDE, self.side_network)
        self._installed = Installed(model, blocks, adapted, [self.side_network])
        model.__dict__[HANDLE] = self

    @property
    def start(self) -> int:
        """M."""
        return self.settings.start

    @property
    def adapted(self) -> int:
        """The first block from M on that keeps its shape."""
        return self._installed.adapted

    @property
    def attached(self) -> bool:
        """False after detach()."""
        return self.model.__dict__.get(HANDLE) is self

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the side network and the head: for the optimizer.

        Raises:
            ValueError: it was detached.
        """
        modules = nn.ModuleList(module for _, module in self._trained())
        return modules.parameters()

    def _trained(self) -> list[tuple[str, nn.Module]]:
        if not self.attached:
            raise ValueError("The side network was detached. attach(model) returns a handle of another one.")
        return [(SIDE, self.side_network), *((path, self.model.get_submodule(path)) for path in self.head)]

    def state_dict(self) -> dict[str, Any]:
        """What was trained, and what it was trained on: kilobytes.

        Returns:
            "tensors" of the side network and the head by their names in the model, "settings" of attach, the paths of
            "blocks", and "backbone", a fingerprint of its values. torch.load reads it with weights_only=True.

        Raises:
            ValueError: it was detached; the backbone has no values yet, or its buffers changed; the head has state that
                is no tensor.
        """
        tensors = {
            f"{path}.{name}": tensor for path, module in self._trained() for name, tensor in module.state_dict().items()
        }
        check_tensors(tensors)
        self._frozen.check()
        settings, blocks = asdict(self.settings), list(self.blocks)
        return {"tensors": tensors, "settings": settings, "blocks": blocks, "backbone": self.fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what state_dict returned, into a network with the same backbone and settings: all of it or nothing.

        Compared are the values of the backbone, not what its modules do with them.

        Args:
            state: of state_dict.

        Raises:
            ValueError: it is no state of a side-tuned network, or that of another backbone, of other settings, or has
                tensors of other names or shapes; the side network was detached.
        """
        load(state, self.state_dict())

    def fingerprint(self) -> str:
        """SHA-256 of the backbone's names and values."""
        return fingerprint(self.model, (SIDE, *self.head))

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
        self.model._modules.pop(SIDE, None)
        self.model.__dict__.pop(HANDLE, None)

    def __str__(self) -> str:
        name = "DTL+" if self.settings.plus else "DTL"
        title = f"{name} of rank {self.settings.rank} from block {self.start} of {len(self.blocks)}"
        return f"{title}\n{table(self.all_blocks, self.side_network)}"


def handle_of(model: nn.Module) -> SideTuned:
    """The handle of a side-tuned model, such as a copy of one, which has its own.

    Args:
        model: what attach was called on, or a copy of it.

    Raises:
        ValueError: the model is not side-tuned.
    """
    handle = unwrapped(model).__dict__.get(HANDLE)
    if handle is None:
        raise ValueError("handle_of: the model is not side-tuned. attach(model) makes it so, and returns its handle.")
    return handle  # type: ignore[no-any-return]

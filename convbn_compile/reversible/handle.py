"""make_reversible: a pretrained network whose residual blocks keep no activations, in place, and the handle to it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from convbn_compile._wrapped import check_module, unwrapped
from convbn_compile.reversible._chain import Chain
from convbn_compile.reversible._chains import Found, find, named
from convbn_compile.reversible._checks import AUTO, check_anchors, coefficients_of
from convbn_compile.reversible._compiled import compile_units
from convbn_compile.reversible._gradients import gradients, relative_difference
from convbn_compile.reversible._installed import Installed
from convbn_compile.reversible._segment import Coefficients
from convbn_compile.reversible.precision import LARGEST_ERROR, longest, predicted_error

logger = logging.getLogger("convbn_compile")

WORSE = 10
"""How many times the predicted error that was warned of there is a warning again at."""

PAYS = 3
"""F in a row that save less when they are rebuilt: two are kept by two tensors, as their inputs are."""

_HANDLE = "_convbn_reversible"


def make_reversible(
    model: nn.Module,
    alpha: float = 1.0,
    beta: float = 0.125,
    chains: Iterable[Any] | None = None,
    anchor_every: int | str | None = AUTO,
) -> Reversible:
    """Run the residual blocks of a pretrained network as reversible chains, whose activations backward rebuilds.

    Dr²Net (arXiv 2401.04105). In place: parameters, their names and state_dict stay. What is saved for backward of a
    chain is its last pair of streams, whatever its depth, and a pair for each anchor; without gradients the same
    network is a plain loop. At alpha = 1, beta = 0 it is the pretrained network; at any other pair it is another one,
    which fine-tuning with a CoefficientSchedule moves away from it.

    Args:
        model: a ResNet, ResNeXt, RegNet, ConvNeXt, ViT or Swin of torchvision or timm; any other with `chains`.
        alpha: of the residual connections that the pretrained network has.
        beta: of the second ones; 0 is for inference only, as the inverse divides by it.
        chains: for each chain the path of a module whose children are its blocks, such as "layer3", or the paths of its
            blocks. A block that is not of a known class is taken for x + F(x), of one tensor. None: all that are found.
        anchor_every: after how many F, of which a transformer's block has two, the streams are kept; "auto" by the
            error that is predicted for alpha, beta, the depth and the dtype; None keeps none but the last.

    Returns:
        The handle.

    Raises:
        TypeError: `model` is not a module; arguments of the wrong type.
        ValueError: no chain is found; a coefficient out of range; the model is reversible already; a block has hooks.

    Examples:
        >>> blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
        >>> make_reversible(blocks, chains=[""]).chains
        (('0', '1', '2'),)
    """
    check_module(model, "make_reversible")
    inner = unwrapped(model)
    if _HANDLE in inner.__dict__:
        raise ValueError("make_reversible: the model is reversible already. Call restore() of its handle first.")
    coefficients = coefficients_of(alpha, beta)
    check_anchors(anchor_every)
    found = find(inner) if chains is None else named(inner, chains)
    if not found:
        raise ValueError(
            f"make_reversible found no two residual blocks of one shape in a row in {type(inner).__name__}. Known are "
            "those of ResNets, RegNets, ConvNeXt, ViT and Swin of torchvision and timm; for others name the module "
            'whose children they are: chains=["blocks"].'
        )
    handle = Reversible(inner, found, coefficients, anchor_every)
    logger.info("make_reversible: %s", handle)
    return handle


class Reversible:
    """The handle of a reversible network: its coefficients, its chains, and the way back.

    Attributes:
        model: the module.
        chains: for each the paths of its blocks.
        anchor_every: as it was given.
        coefficients: alpha and beta.
        ordinary: True while gradient_error runs the same network under ordinary autograd.
    """

    def __init__(
        self, model: nn.Module, found: Sequence[Found], coefficients: Coefficients, anchor_every: int | str | None
    ) -> None:
        self.model, self.coefficients, self.anchor_every, self.ordinary = model, coefficients, anchor_every, False
        self.chains = tuple(tuple(one.paths) for one in found)
        self._chains = [Chain(one.units, one.paths, self) for one in found]
        self._installed: list[Installed] = []
        self._warned_of = 0.0
        self._warn_beforehand()
        self._install(found)

    @property
    def alpha(self) -> float:
        """Of the residual connections that the pretrained network has."""
        return self.coefficients.alpha

    @property
    def beta(self) -> float:
        """Of the second ones."""
        return self.coefficients.beta

    def set(self, alpha: float, beta: float) -> None:
        """Other coefficients, from the next forward on: between optimizer steps. Backward has those of its forward.

        Args:
            alpha: of the residual connections that the pretrained network has.
            beta: of the second ones.

        Raises:
            TypeError: one is no number.
            ValueError: one is below 0 or not finite.
        """
        self.coefficients = coefficients_of(alpha, beta)
        self._warn_beforehand()

    def compile(self, **kwargs: Any) -> None:
        """Compile every block, with batch norm folded inside of it, for forward and for what backward computes again.

        The rest of the model is for torch.compile(model) or turn_on(model), whose graph breaks at each chain.

        Args:
            kwargs: of torch.compile; the backend is convbn_tune unless they say otherwise.
        """
        compile_units([unit for chain in self._chains for unit in chain.units], **{"backend": "convbn_tune", **kwargs})

    def lengths(self, chain: Chain, dtype: torch.dtype, *, low_precision: bool) -> list[int]:
        """How many units of a chain are rebuilt in a row, from anchor to anchor.

        Args:
            chain: one of them.
            dtype: of the streams.
            low_precision: the blocks compute in 16 bits.
        """
        kind = {"rectified": chain.rectified, "low_precision": low_precision}
        units, every = len(chain.units), self._every(chain, dtype, **kind)
        error = predicted_error(self.alpha, self.beta, every, dtype, **kind)
        if error > max(LARGEST_ERROR if dtype.itemsize > 2 else 0, WORSE * self._warned_of):
            self._warned_of = error
            warnings.warn(
                f"make_reversible: {every} F in a row at alpha = {self.alpha:g}, beta = {self.beta:g} in {dtype} "
                f"predict a relative error of {error:.0e} in gradients or more. Use "
                'anchor_every="auto" or a smaller number, a larger beta, or float32.',
                stacklevel=2,
            )
        whole, rest = divmod(units, every)
        return [every] * whole + ([1] * rest if rest < PAYS else [rest])

    def _warn_beforehand(self) -> None:
        """Of a large error, for streams in the dtype of the parameters."""
        for chain in self._chains if self.beta else ():
            parameters = (one for unit in chain.units for one in unit.module.parameters() if one.is_floating_point())
            self.lengths(chain, next((one.dtype for one in parameters), torch.float32), low_precision=False)

    def _every(self, chain: Chain, dtype: torch.dtype, **kind: bool) -> int:
        units = len(chain.units)
        if isinstance(self.anchor_every, int):
            most: int | None = self.anchor_every
        else:
            most = None if self.anchor_every is None else longest(self.alpha, self.beta, dtype, **kind)
        every = units if most is None else min(units, most)
        return every if every >= PAYS else 1

    def gradient_error(self, *inputs: Any, **kwargs: Any) -> float:
        """How far gradients are from those of ordinary autograd for the same network, today.

        Forward and backward run twice, with the same random numbers and a random cotangent; gradients, running
        statistics and the generators are afterwards what they were.

        Args:
            inputs: what the model is called with.
            kwargs: likewise.

        Returns:
            ‖difference‖ / ‖gradient‖ over all parameters together.

        Raises:
            ValueError: no parameter requires grad, beta is 0, or restore() was called.
        """
        if not self._installed:
            raise ValueError("gradient_error: restore() gave the original model back, which is not reversible.")
        self.ordinary = True
        try:
            wanted = gradients(self.model, inputs, kwargs)
        finally:
            self.ordinary = False
        return relative_difference(wanted, gradients(self.model, inputs, kwargs))

    def restore(self) -> nn.Module:
        """Give the original model back, in place, with the weights that it has now.

        Returns:
            The model.
        """
        while self._installed:
            self._installed.pop().remove()
        self.model.__dict__.pop(_HANDLE, None)
        return self.model

    def __str__(self) -> str:
        rows = []
        for chain in self._chains:
            row = [f"{chain.paths[0]} to {chain.paths[-1]}", str(len(chain.units))]
            if self.beta:
                every = self._every(chain, torch.float32, rectified=chain.rectified)
                error = predicted_error(self.alpha, self.beta, every, rectified=chain.rectified)
                row += [str(every), f"{error:.0e}"]
            rows.append(row)
        title = f"alpha = {self.alpha:g}, beta = {self.beta:g}"
        return f"{title}\n{tabulate(rows, headers=('chain', 'F', 'anchor every', 'error predicted, float32'))}"

    def _install(self, found: Sequence[Found]) -> None:
        self.model.__dict__[_HANDLE] = self
        try:
            for one, chain in zip(found, self._chains, strict=True):
                self._installed.append(Installed(one, chain))
        except ValueError:
            self.restore()
            raise


def handle_of(model: nn.Module) -> Reversible:
    """The handle of a reversible model, such as a copy of one, which has its own.

    Args:
        model: what make_reversible was called on, or a copy of it.

    Raises:
        ValueError: the model is not reversible.
    """
    handle = unwrapped(model).__dict__.get(_HANDLE)
    if handle is None:
        raise ValueError(
            "handle_of: the model is not reversible. make_reversible(model) makes it so, and returns its handle."
        )
    return handle  # type: ignore[no-any-return]

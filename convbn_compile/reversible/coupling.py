"""One step of the two streams of Dr²Net, its inverse, and the two ends of a chain (arXiv 2401.04105, equation 1).

    x' = G(x) + y          x = y' / beta
    y' = beta * x          y = x' - G(x)            G(x) = F(x) + alpha * x

    x, y    the streams before the block, of one shape; x', y' after it
    F       the block without its residual connection; alpha weights that, beta the second one, which skips two blocks

Exact in real numbers wherever beta is not 0. With alpha = 1 and beta = 0 the second stream is 0 and x' is what the
pretrained block makes of x; with alpha = 0 and beta = 1 it is RevNet's coupling.
A chain starts with y = beta * x, which is 0 at beta = 0 and a second copy at beta = 1, and ends with
(x + y) / (1 + beta), which is x at beta = 0 and the mean at beta = 1, as in Re²TAL; the paper's are not public.
"""

from __future__ import annotations

from torch import Tensor

Streams = tuple[Tensor, Tensor]


def forward(g: Tensor, x: Tensor, y: Tensor, beta: float) -> Streams:
    """(x', y') of G(x), x and y; x' in the dtype of y."""
    return g.to(y.dtype) + y, beta * x


def input_of(after: Tensor, beta: float) -> Tensor:
    """The x before the block, of its y'."""
    return after / beta


def second_of(after: Tensor, g: Tensor) -> Tensor:
    """The y before the block, of its x' and of G(x)."""
    return after - g.to(after.dtype)


def start(x: Tensor, beta: float) -> Streams:
    """The streams before the first block."""
    return x, beta * x


def end(x: Tensor, y: Tensor, beta: float) -> Tensor:
    """What leaves the chain."""
    return (x + y) / (1 + beta)

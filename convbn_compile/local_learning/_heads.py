"""Auxiliary heads, adaptive in width: what a unit's local loss looks at its output through.

    f = clamp(2^floor(log2(c)), 16, 256)                                    c channels of the unit's output
    head(a) = Linear(4 f -> K)(AdaptiveAvgPool(2)(ReLU(BN(conv3x3(c -> f)(a)))))

The paper (arXiv 2402.14139, adaptive auxiliary networks) has a number of filters that varies with the layer, where
classic local learning has 256 for all; the rule for it is not public. This one makes a head about as wide as its unit,
so that it takes no more memory than the unit itself: at 32 x 32, 256 filters behind 64 channels take four times of it.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

LEAST, MOST = 16, 256
"""Filters."""


def width(channels: int) -> int:
    """f: the filters of the head of a unit with so many channels.

    Examples:
        >>> [width(channels) for channels in (8, 64, 96, 512)]
        [16, 64, 64, 256]
    """
    return min(max(1 << (channels.bit_length() - 1), LEAST), MOST)


def auxiliary_head(shape: tuple[int, ...], num_classes: int, filters: int | None = None) -> nn.Module:
    """The head of a unit, with random weights.

    Args:
        shape: of the unit's output for one image: [C, H, W], or [C].
        num_classes: K.
        filters: f; by default the rule above.

    Returns:
        From [N, *shape] to logits [N, K].

    Raises:
        ValueError: a shape of neither kind.
    """
    if len(shape) == 1:
        return nn.Linear(shape[0], num_classes)
    if len(shape) != 3:
        raise ValueError(f"An auxiliary head needs features of shape [C, H, W] or [C], got {list(shape)}.")
    filters = filters or width(shape[0])
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(shape[0], filters, 3, padding=1, bias=False),
            bn=nn.BatchNorm2d(filters),
            relu=nn.ReLU(inplace=True),
            pool=nn.AdaptiveAvgPool2d(2),
            flatten=nn.Flatten(),
            fc=nn.Linear(4 * filters, num_classes),
        )
    )

"""Auxiliary heads, adaptive in width: what a unit's local loss looks at its output through.

    f       = clamp(2^floor(log2(c)), 16, 256)                              c channels of the unit's output
    head(a) = Linear(4 f -> K)(AdaptiveAvgPool(2)(ReLU(BN(conv3x3(c -> f)(mean(a))))))

The paper (arXiv 2402.14139, adaptive auxiliary networks) has a number of filters that varies with the layer, where
classic local learning has 256 for all; the rule for it is not public. This one makes a head about as wide as its unit.
mean(a) averages a map of H x W to ceil(H / 4) x ceil(W / 4), and not below 2 x 2, as the cheap heads of decoupled
greedy learning (Belilovsky et al., arXiv 1901.08164) do: the head takes a small part of the unit's time and memory
then, where 256 filters on the whole map take many times of them.
"""

from __future__ import annotations

from torch import nn

from convbn_compile._arguments import count, located

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
        filters: f, on the whole map, as in classic local learning; by default the rules above.

    Returns:
        From [N, *shape] to logits [N, K].

    Raises:
        TypeError: not integers.
        ValueError: a shape of neither kind, or a number below 1.
    """
    shape = tuple(located("shape", count, size) for size in shape)
    located("num_classes", count, num_classes)
    if filters is not None:
        located("filters", count, filters)
    if len(shape) == 1:
        return nn.Linear(shape[0], num_classes)
    if len(shape) != 3:
        raise ValueError(f"An auxiliary head needs features of shape [C, H, W] or [C], got {list(shape)}.")
    channels, rows, columns = shape
    mean = nn.AdaptiveAvgPool2d((max(2, -(-rows // 4)), max(2, -(-columns // 4)))) if filters is None else nn.Identity()
    f = filters or width(channels)
    conv = nn.Conv2d(channels, f, 3, padding=1, bias=False)
    looks = nn.Sequential(mean, conv, nn.BatchNorm2d(f), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2))
    return nn.Sequential(looks, nn.Flatten(), nn.Linear(4 * f, num_classes))

"""Whether a block's input is read from a cache or computed again, by what either takes.

    cache:     n (r + f) + n z / w + E n z / v          written once, read in E epochs
    recompute: E n (r + f)

n images, r seconds to read one from where the input comes from so far, f to take it through the blocks since, z bytes
that it is then, w and v the storage's bytes a second. The paper (arXiv 2402.14139) caches always.
"""

from __future__ import annotations

from dataclasses import dataclass

from convbn_compile.estimate import MIB
from convbn_compile.local_learning._disk import Speed


@dataclass(frozen=True)
class Costs:
    """What is known before the choice.

    Attributes:
        images: n, training and validation.
        epochs: E.
        seconds: r + f.
        size: z.
        speed: w and v.
        fits: the blocks before fit into memory beside this one.
    """

    images: int
    epochs: int
    seconds: float
    size: int
    speed: Speed
    fits: bool

    @property
    def bytes(self) -> int:
        """Of a cache."""
        return self.images * self.size

    @property
    def of_cache(self) -> float:
        """Seconds."""
        read = self.epochs * self.bytes / self.speed.read
        return self.images * self.seconds + self.bytes / self.speed.write + read

    @property
    def of_recomputing(self) -> float:
        """Seconds."""
        return self.epochs * self.images * self.seconds


def choose(costs: Costs) -> tuple[str, str]:
    """Returns "cache" or "recomputed", and why."""
    if not costs.fits:
        return "cache", "the blocks before do not fit into the budget beside this one"
    times = f"{costs.of_cache:.2f} s with a cache of {costs.bytes / MIB:.1f} MiB, {costs.of_recomputing:.2f} s without"
    return ("cache" if costs.of_cache <= costs.of_recomputing else "recomputed"), times

"""Random networks against eager, with hypothesis: `make fuzz`, or python tests/fuzz.py --cases 1000 --seed 7.

A network is a list of steps over a pool of tensors of one channel count: convolutions of all kinds, linear layers,
norms of both kinds of statistics and by hand, activations, views, residuals, products and concatenations; modules are
shared at times, subsets of the parameters frozen. It runs in float64, compiled with lowering="aot_eager" and
fold="always", and must give eager's output, gradients and running statistics; what is saved for backward must not be
more than without folds. Every counterexample found is kept as a named test.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from dataclasses import dataclass
from typing import Any

import hypothesis
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from support import compiled, counted, randomise, run
from torch import Tensor, nn
from tqdm import tqdm

CHANNELS = 4
TOLERANCE = 1e-8


class Affine(nn.Module):
    """A scale and a shift per channel, written by hand in one of several ways."""

    def __init__(self, spelling: int) -> None:
        super().__init__()
        self.spelling = spelling
        self.weight, self.bias = nn.Parameter(torch.randn(CHANNELS)), nn.Parameter(torch.randn(CHANNELS))
        self.register_buffer("mean", torch.randn(CHANNELS))
        self.register_buffer("var", torch.rand(CHANNELS) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.dim() - 2)
        weight, bias, mean, var = (t.reshape(shape) for t in (self.weight, self.bias, self.mean, self.var))
        if self.spelling == 0:
            return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias
        if self.spelling == 1:
            scale = weight * (var + 1e-5).rsqrt()
            return x * scale + (bias - mean * scale)
        if self.spelling == 2:
            return torch.addcmul(bias, x, weight)
        if self.spelling == 3:
            return bias - x * weight
        return (x.transpose(1, -1) * self.weight).transpose(1, -1)


class PerPixel(nn.Module):
    """A linear layer over the channels."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(CHANNELS, CHANNELS, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose(1, -1)).transpose(1, -1)


@dataclass(frozen=True)
class Step:
    """One step: what it does, to which tensors of the pool, with which module if that is shared."""

    kind: str
    options: tuple[Any, ...]
    first: int
    second: int
    shares: int


SIMPLE = {
    "convolution": st.tuples(
        st.sampled_from([1, 3]), st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]), st.booleans(), st.booleans()
    ),
    "linear": st.tuples(st.booleans()),
    "norm": st.tuples(st.booleans()),
    "affine": st.tuples(st.integers(0, 4)),
}
LINEAR = st.one_of(*(st.tuples(st.just(kind), SIMPLE[kind]) for kind in ("convolution", "linear")))
AFFINE = st.one_of(*(st.tuples(st.just(kind), SIMPLE[kind]) for kind in ("norm", "affine")))
KINDS = {
    **SIMPLE,
    "block": st.tuples(LINEAR, AFFINE, st.lists(AFFINE, max_size=1)),
    "activation": st.tuples(st.sampled_from(["relu", "relu6", "silu", "hardtanh", "gelu", "sigmoid"])),
    "add": st.just(()),
    "multiply": st.just(()),
    "concatenate": st.just(()),
    "number": st.sampled_from([(0.5,), (-2.0,)]),
}
WEIGHTS = [*KINDS, *["block"] * 8, "activation"]


@st.composite
def steps(draw: st.DrawFn) -> list[Step]:
    """A network."""
    found = []
    for _ in range(draw(st.integers(2, 9))):
        kind = draw(st.sampled_from(WEIGHTS))
        index = st.sampled_from([0, 0, 0, 0, 1, 2])
        shares = draw(st.sampled_from([0, 0, 0, 1]))
        found.append(Step(kind, draw(KINDS[kind]), draw(index), draw(index), shares))
    return found


class Net(nn.Module):
    """A network of steps; 0 is the newest tensor of the pool."""

    def __init__(self, steps: list[Step], rank: int) -> None:
        super().__init__()
        self.steps, self.rank = steps, rank
        self.parts = nn.ModuleList()
        self.part_of: list[int] = []
        for step in steps:
            before = [i for i, other in enumerate(steps[: len(self.part_of)]) if other.kind == step.kind]
            if step.shares and before and self.part_of[before[-1]] >= 0:
                self.part_of.append(self.part_of[before[-1]])
                continue
            part = self._make(step.kind, step.options)
            self.part_of.append(-1 if part is None else len(self.parts))
            if part is not None:
                self.parts.append(part)

    def _make(self, kind: str, given: tuple[Any, ...]) -> nn.Module | None:
        if kind == "block":
            linear, affine, more = given
            return nn.Sequential(*(self._make(*part) for part in (linear, affine, *more)))
        if kind == "convolution":
            kernel, dilation, groups, bias, transposed = given
            kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d) if transposed else (nn.Conv1d, nn.Conv2d)
            padding = dilation * (kernel - 1) // 2
            options = {"padding": padding, "dilation": dilation, "groups": groups, "bias": bias}
            return kinds[self.rank - 1](CHANNELS, CHANNELS, kernel, **options)
        if kind == "linear":
            return PerPixel(bias=given[0])
        if kind == "norm":
            return (nn.BatchNorm1d, nn.BatchNorm2d)[self.rank - 1](CHANNELS, affine=given[0])
        return Affine(given[0]) if kind == "affine" else None

    def forward(self, x: Tensor) -> Tensor:
        pool = [x]
        for step, index in zip(self.steps, self.part_of, strict=True):
            first, second = (pool[-1 - min(i, len(pool) - 1)] for i in (step.first, step.second))
            pool.append(self._run(step, index, first, second))
        return torch.tanh(pool[-1]) + 0.1 * pool[len(pool) // 2]

    def _run(self, step: Step, index: int, first: Tensor, second: Tensor) -> Tensor:
        if index >= 0:
            return self.parts[index](first)
        if step.kind == "activation":
            return getattr(F, step.options[0])(first)
        if step.kind == "number":
            return first * step.options[0] + 1.0
        if step.kind == "concatenate":
            return torch.cat([first, second], 1)[:, 2 : 2 + CHANNELS]
        return first + second if step.kind == "add" else first * torch.sigmoid(second)


@dataclass(frozen=True)
class Case:
    """A network and how it runs."""

    steps: list[Step]
    rank: int
    size: tuple[int, int]
    frozen: int
    trains_norms: int
    input_requires_grad: bool
    seed: int


CASES = st.builds(
    Case,
    steps=steps(),
    rank=st.integers(1, 2),
    size=st.tuples(st.integers(2, 3), st.integers(1, 6)),
    frozen=st.one_of(st.just(0), st.integers(0, 2**16 - 1)),
    trains_norms=st.sampled_from([0, 0, 0, 5]),
    input_requires_grad=st.booleans(),
    seed=st.integers(0, 3),
)


def check(case: Case) -> int:
    """Assert that the case runs as eager; how many norms and maps were folded."""
    torch._dynamo.reset()
    torch.manual_seed(case.seed)
    model = randomise(Net(case.steps, case.rank).double())
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(not case.frozen >> (index % 16) & 1)
    for index, module in enumerate(model.modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(bool(case.trains_norms >> (index % 3) & 1))
    batch, side = case.size
    x = torch.randn(batch, CHANNELS, *(side + 1,) * case.rank, dtype=torch.float64)
    x.requires_grad_(case.input_requires_grad)
    reference = copy.deepcopy(model)
    wanted = run(reference, reference, x)
    with warnings.catch_warnings(), counted() as counts:
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="convbn_tune folded no batch norm")
        found = run(compiled(model, fold="always"), model, x)
    _compare(found, wanted)
    for mine, theirs in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)
    return counts.folded


def _compare(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> None:
    """Relative to the largest of all gradients: one that is 0 but for rounding has no scale of its own."""
    scales = [tensor.abs().max().item() for name, tensor in wanted.items() if tensor is not None and name != "output"]
    for name, want in wanted.items():
        got = found[name]
        assert (got is None) == (want is None), name
        if got is not None and want is not None:
            scale = want.abs().max().item() if name == "output" else max(scales)
            error = (got - want).abs().max().item() / max(scale, 1e-30)
            assert error <= TOLERANCE, f"{name}: {error}"


def fuzz(cases: int, seed: int, *, progress: bool = True) -> int:
    """Check so many random cases; how many maps were folded in all."""
    bar = tqdm(total=cases, disable=not progress)
    folded = 0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    @hypothesis.given(CASES)
    def checks(case: Case) -> None:
        nonlocal folded
        folded += check(case)
        bar.update()

    checks()
    bar.close()
    return folded


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folded = fuzz(arguments.cases, arguments.seed)
    print(f"{arguments.cases} cases from seed {arguments.seed}, {folded} maps folded, none wrong")


if __name__ == "__main__":
    main()

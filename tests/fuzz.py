"""Random networks against eager, with hypothesis: `make fuzz`, or python tests/fuzz.py --cases 1000 --seed 7.

A network is a list of steps over a pool of tensors of one channel count: convolutions of all kinds, linear layers,
norms of both kinds of statistics and by hand, activations, views, residuals, products and concatenations; modules are
shared at times, subsets of the parameters frozen. It is compiled without code generation. In float64 it must give
eager's output, gradients and running statistics; in narrower dtypes and under autocast it must be no further from
float64 than eager, within what random rounding does. With fold="auto", what is saved for backward must not be more than
without folds, but for vectors of the channels. Every counterexample found is kept as a named test in test_fuzz.py.
"""

from __future__ import annotations

import argparse
import copy
import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest import mock

import hypothesis
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from support import compiled, counted, difference, magnitude, randomise, run
from torch import Tensor, fx, nn
from tqdm import tqdm

from convbn_compile import saved_bytes
from convbn_compile.lowering import lower
from convbn_compile.options import Fold, Lowering, Options
from convbn_compile.report import Report

Results = dict[str, Any]

CHANNELS = 4
CHAOS = 0.5
"""Where rounding is that large, as under a batch norm of four values in training mode, numbers say nothing."""


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


class Number(nn.Module):
    """A scale and a shift that are numbers."""

    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class PerPixel(nn.Module):
    """A linear layer over the channels, its weight a parameter or a product of two."""

    def __init__(self, *, bias: bool, low_rank: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(CHANNELS, CHANNELS, bias=bias)
        self.down = nn.Parameter(torch.randn(2, CHANNELS)) if low_rank else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight if self.down is None else self.linear.weight[:, :2] @ self.down
        return F.linear(x.transpose(1, -1), weight, self.linear.bias).transpose(1, -1)


class Branches(nn.Module):
    """The sum of what parts make of one input, each times a number; those of other sizes are added apart.

    The input of some is detached.
    """

    def __init__(self, parts: list[nn.Module], factors: tuple[float, ...], detached: tuple[bool, ...]) -> None:
        super().__init__()
        self.parts, self.factors, self.detached = nn.ModuleList(parts), factors, detached

    def forward(self, x: Tensor) -> Tensor:
        sums: dict[torch.Size, Tensor] = {}
        for part, factor, detached in zip(self.parts, self.factors, self.detached, strict=True):
            found = part(x.detach() if detached else x)
            found = found if factor == 1 else factor * found
            sums[found.shape] = sums[found.shape] + found if found.shape in sums else found
        first, *rest = sums.values()
        return sum((F.interpolate(other, first.shape[2:]) for other in rest), first)


@dataclass(frozen=True)
class Step:
    """One step: what it does, to which tensors of the pool, with which module if that is shared."""

    kind: str
    options: tuple[Any, ...]
    first: int
    second: int
    shares: int


CONVOLUTIONS = st.fixed_dictionaries(
    {
        "kernel_size": st.sampled_from([1, 3]),
        "stride": st.sampled_from([1, 1, 1, 2]),
        "dilation": st.sampled_from([1, 2]),
        "groups": st.sampled_from([1, 2, 4]),
        "bias": st.booleans(),
        "padding_mode": st.sampled_from(["zeros", "zeros", "zeros", "circular"]),
        "transposed": st.booleans(),
    }
)
NUMBERS = st.sampled_from([(0.5, 1.0), (-2.0, 0.0), (1.0, 3.0)])
SIMPLE = {
    "convolution": st.tuples(CONVOLUTIONS),
    "linear": st.tuples(st.booleans(), st.sampled_from([False, False, False, True])),
    "norm": st.tuples(st.booleans()),
    "affine": st.tuples(st.integers(0, 4)),
    "number": NUMBERS,
}
LINEAR = st.one_of(*(st.tuples(st.just(kind), SIMPLE[kind]) for kind in ("convolution", "linear")))
AFFINE = st.one_of(*(st.tuples(st.just(kind), SIMPLE[kind]) for kind in ("norm", "affine", "number")))
BRANCH = st.tuples(
    st.one_of(st.none(), *[st.tuples(st.sampled_from([1, 3]), st.sampled_from([1, 1, 1, 2]), st.booleans())] * 3),
    st.lists(AFFINE, max_size=2),
    st.sampled_from([1, 1, 1, -1, 0.5]),
    st.sampled_from([False, False, False, True]),
)
KINDS = {
    **SIMPLE,
    "branches": st.tuples(
        st.sampled_from([1, 1, 1, 2]),
        st.sampled_from([1, 2, 4]),
        st.sampled_from([False, False, False, True]),
        st.lists(BRANCH, min_size=2, max_size=4),
    ),
    "block": st.tuples(LINEAR, AFFINE, st.lists(AFFINE, max_size=2)),
    "activation": st.tuples(st.sampled_from(["relu", "relu6", "silu", "hardtanh", "gelu", "sigmoid"])),
    "add": st.just(()),
    "multiply": st.just(()),
    "concatenate": st.just(()),
}
WEIGHTS = [*KINDS, *["block"] * 8, *["branches"] * 4, "activation"]


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
    """A network of steps; 0 is the newest tensor of the pool. If smooth, no rounding can open or close a ReLU."""

    def __init__(self, steps: list[Step], rank: int, *, smooth: bool) -> None:
        super().__init__()
        self.steps, self.rank, self.smooth = steps, rank, smooth
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
        if kind == "branches":
            return self._branches(*given)
        if kind == "convolution":
            return self._convolution(**given[0])
        if kind == "linear":
            return PerPixel(bias=given[0], low_rank=given[1])
        if kind == "norm":
            return (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[self.rank - 1](CHANNELS, affine=given[0])
        if kind == "number":
            return Number(*given)
        return Affine(given[0]) if kind == "affine" else None

    def _branches(self, stride: int, groups: int, transposed: bool, branches: list[Any]) -> nn.Module:
        common = {"stride": stride, "groups": groups, "transposed": transposed, "padding_mode": "zeros"}
        parts = []
        for given, affines, *_ in branches:
            part: list[Any] = [self._make(*affine) for affine in affines]
            if given is not None:
                kernel_size, dilation, bias = given
                part.insert(0, self._convolution(kernel_size=kernel_size, dilation=dilation, bias=bias, **common))
            parts.append(nn.Sequential(*part))
        *_, factors, detached = zip(*branches, strict=True)
        return Branches(parts, factors, detached)

    def _convolution(self, *, transposed: bool, padding_mode: str, **options: Any) -> nn.Module:
        """Padded so that a stride of 1 keeps the size."""
        options["padding"] = options["dilation"] * (options["kernel_size"] - 1) // 2
        if transposed:
            kinds: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        else:
            kinds, options["padding_mode"] = (nn.Conv1d, nn.Conv2d, nn.Conv3d), padding_mode
        return kinds[self.rank - 1](CHANNELS, CHANNELS, **options)

    def forward(self, x: Tensor) -> Tensor:
        pool = [x]
        for step, index in zip(self.steps, self.part_of, strict=True):
            first, second = (pool[-1 - min(i, len(pool) - 1)] for i in (step.first, step.second))
            pool.append(self._run(step, index, first, second))
        return torch.tanh(pool[-1]) + 0.1 * pool[len(pool) // 2]

    def _run(self, step: Step, index: int, first: Tensor, second: Tensor) -> Tensor:
        if index >= 0:
            found = self.parts[index](first)
            return found if found.shape == first.shape else F.interpolate(found, first.shape[2:])
        if step.kind == "activation":
            return F.silu(first) if self.smooth else getattr(F, step.options[0])(first)
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
    dtype: str
    fold: Fold
    seed: int


ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "autocast": torch.float32,
}
CASES = st.builds(
    Case,
    steps=steps(),
    rank=st.sampled_from([1, 2, 2, 3]),
    size=st.tuples(st.integers(2, 3), st.integers(3, 6)),
    frozen=st.one_of(st.just(0), st.integers(0, 2**16 - 1)),
    trains_norms=st.sampled_from([0, 0, 0, 5]),
    input_requires_grad=st.booleans(),
    dtype=st.sampled_from([*["float64"] * 6, *DTYPES]),
    fold=st.sampled_from(Fold),
    seed=st.integers(0, 3),
)


def check(case: Case) -> int:
    """Assert that the case runs as eager; how many norms and maps were folded."""
    torch._dynamo.reset()
    torch.manual_seed(case.seed)
    model = randomise(Net(case.steps, case.rank, smooth=case.dtype != "float64").double())
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(not case.frozen >> (index % 16) & 1)
    for index, module in enumerate(model.modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(bool(case.trains_norms >> (index % 3) & 1))
    batch, side = case.size
    x = torch.randn(batch, CHANNELS, *(side,) * case.rank, dtype=torch.float64)
    x.requires_grad_(case.input_requires_grad)
    exact, narrow = copy.deepcopy(model), DTYPES[case.dtype]
    wanted = run(exact, exact, x)
    model, x = model.to(narrow), x.detach().to(narrow).requires_grad_(case.input_requires_grad)
    eager = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "autocast"):
        theirs = _errors(run(eager, eager, x), wanted)
        found, report = _tuned(model, x, case)
        mine = _errors(found, wanted)
        allowed = max(ROUNDING[torch.bfloat16 if case.dtype == "autocast" else narrow], 4 * max(theirs.values()))
        if max(mine.values()) > allowed:  # as a norm of equal values in training mode makes it: without folds, too?
            torch._dynamo.reset()
            other = copy.deepcopy(model)  # so that the statistics compared below are updated once
            allowed = max(allowed, 4 * max(_errors(run(compiled(other, mode="eval"), other, x), wanted).values()))
            allowed = max(allowed, 4 * _of_rounding(eager, x, wanted))
    assert mine.keys() == theirs.keys()
    worst = max(mine, key=mine.__getitem__)
    assert allowed > CHAOS or mine[worst] <= allowed, f"{worst}: {mine[worst]}, eager {theirs[worst]}"
    if case.dtype == "float64":
        for mine_now, theirs_now in zip(model.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(mine_now, theirs_now)
    if report.saved_bytes_before is not None and report.saved_bytes_after is not None:
        vectors = 8 * CHANNELS * report.norms
        assert report.saved_bytes_after <= report.saved_bytes_before + vectors, report.to_dict()
    return report.folded


def _of_rounding(eager: nn.Module, x: Tensor, wanted: Results) -> float:
    """Largest error of a few eager runs, in each of which parameters and input are off by a rounding."""
    worst = 0.0
    for _ in range(8):
        other = copy.deepcopy(eager)
        with torch.no_grad():
            for tensor in (given := x.detach().clone(), *other.parameters()):
                tensor.mul_(1 + torch.finfo(x.dtype).eps * (2 * torch.rand_like(tensor) - 1))
        found = run(other, other, given.requires_grad_(x.requires_grad))
        worst = max(worst, *_errors(found, wanted).values())
    return worst


def _tuned(model: nn.Module, x: Tensor, case: Case) -> tuple[dict[str, Tensor | None], Report]:
    """Output and gradients of the compiled model, and what the pass did; a warning is an error."""
    reports: list[Report] = []
    measure = case.fold is Fold.AUTO and case.dtype == "float64"
    options = Options(lowering=Lowering.AOT_EAGER, fold=case.fold)

    def backend(gm: Any, inputs: Any) -> Any:
        return lower(gm, inputs, options, reports.append, measure=measure)

    # a limit of the partitioner that counts nodes of the whole graph, and so knows folded graphs from others
    no_limit = torch._functorch.config.patch(ban_recompute_long_fusible_chains=False)
    # to the partitioner the slice of a concatenation is as good as what it is sliced from, though it keeps more
    as_partitioned = mock.patch.object(saved_bytes, "storages", _parts_kept)
    with warnings.catch_warnings(), no_limit, as_partitioned, counted() as counts:
        warnings.simplefilter("error")
        found = run(torch.compile(model, backend=backend), model, x)
    assert counts.convolutions_gone == counts.merged
    return found, Report.sum(reports)


def _parts_kept(nodes: Iterable[Any]) -> dict[int, int]:
    """The memory of what nodes are, of each only the part that the last node of it shows."""
    tensors = (node.meta["val"] for node in nodes if isinstance(node, fx.Node))
    return {tensor.untyped_storage()._cdata: tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor)}


def _errors(found: Results, exact: Results) -> dict[tuple[str, torch.dtype], float]:
    """Each gradient relative to the largest of all: one that is 0 but for rounding has no scale of its own.

    All are 0 where nothing is trained but the shift before a norm in training mode.
    """
    gradients = [tensor for name, tensor in exact.items() if tensor is not None and name != "output"]
    scales = dict.fromkeys(exact, max(map(magnitude, gradients), default=0.0))
    scales["output"] = magnitude(exact["output"])
    return {
        (name, tensor.dtype): difference(tensor.double(), exact[name]) / max(scales[name], 1e-3)
        for name, tensor in found.items()
        if tensor is not None
    }


def fuzz(cases: int, seed: int, *, shrink: bool = True, progress: bool = True) -> int:
    """Check so many random cases, and make one that fails small; how many maps were folded in all."""
    bar = tqdm(total=cases, disable=not progress)
    folded = 0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if shrink else [])],
    )
    @hypothesis.given(CASES)
    def checks(case: Case) -> None:
        nonlocal folded
        folded += check(case)
        bar.update()

    checks()
    bar.close()
    return folded


def _share(cases: int, seed: int) -> int:
    torch.set_num_threads(1)
    return fuzz(cases, seed)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first process, each other has the next")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    seeds = range(arguments.seed, arguments.seed + arguments.processes)
    share = -(-arguments.cases // arguments.processes)
    with ProcessPoolExecutor(arguments.processes) as pool:
        folded = sum(pool.map(_share, [share] * len(seeds), seeds))
    print(f"{share} cases from each of the seeds {list(seeds)}, {folded} maps folded, none wrong")


if __name__ == "__main__":
    main()

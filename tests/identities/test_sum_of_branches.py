"""Identity (5) and its adjoints, against autograd; its mutants."""

import itertools

import pytest
import torch
from identities.grid import TOLERANCE, error

from convbn_compile._aten import ConvParams
from convbn_compile.identities import sum_of_branches as five
from convbn_compile.identities.sum_of_branches import Branch, merge


def params(padding, *, stride=1, dilation=1, groups=1, transposed=False):
    rank = len(padding)
    return ConvParams((stride,) * rank, tuple(padding), (dilation,) * rank, transposed, (0,) * rank, groups)


def branch(kernel, dilation=1, **options):
    """Padded so that the kernel's middle reads what it is at."""
    return Branch(params([dilation * (size - 1) // 2 for size in kernel], dilation=dilation, **options), tuple(kernel))


def itself(rank):
    return Branch(None, (1,) * rank)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight_of(branch, channels, seed):
    if branch.params is None:
        return None
    return random(channels, channels // branch.params.groups, *branch.kernel, seed=seed)


SUMS = {
    "repvgg": [branch((3, 3)), branch((1, 1)), itself(2)],
    "mobileone": [branch((3, 3), groups=4)] * 4 + [branch((1, 1), groups=4), itself(2)],
    "grouped": [branch((3, 3), groups=2), itself(2)],
    "only pointwise": [branch((1, 1)), itself(2)],
    "repvgg, strided": [branch((3, 3), stride=2), branch((1, 1), stride=2)],
    "large kernel": [branch((7, 7), groups=4, stride=2), branch((3, 3), groups=4, stride=2)],
    "kernels of one axis": [branch((3, 1)), branch((1, 3)), branch((3, 3))],
    "asymmetric kernel": [branch((5, 1)), branch((3, 3))],
    "dilated": [branch((3, 3), dilation=2), branch((5, 5), dilation=2), branch((1, 1), dilation=2), itself(2)],
    "a dilation that says nothing": [branch((3, 3), dilation=2), Branch(params((0, 0), dilation=5), (1, 1))],
    "even kernels": [Branch(params((0, 0)), (2, 2)), Branch(params((1, 1)), (4, 4))],
    "unpadded": [Branch(params((0, 0)), (3, 3)), Branch(params((1, 1)), (5, 5))],
    "1d": [branch((3,)), branch((1,)), itself(1)],
    "3d": [branch((3, 3, 3)), branch((1, 1, 1)), branch((1, 3, 1)), itself(3)],
    "transposed": [branch((3, 3), stride=2, transposed=True), branch((1, 1), stride=2, transposed=True)],
}


def difference(branches, channels=4):
    """Largest relative error of the sum, the input's gradient and each weight's."""
    merged = merge(branches)
    assert not isinstance(merged, str), merged
    input = random(2, channels, *(7, 6, 5)[: len(merged.kernel)], seed=9).requires_grad_()
    weights = [weight_of(branch, channels, seed) for seed, branch in enumerate(branches)]
    leaves = [weight.requires_grad_() for weight in weights if weight is not None]
    output = five.before(input, weights, branches)
    grad_output = random(*output.shape, seed=8)
    grad_input, *grad_weights = torch.autograd.grad(output, [input, *leaves], grad_output)
    with torch.no_grad():
        one = five.identity(torch.ones(channels, dtype=torch.float64), merged)
        total = five.add([one if weight is None else weight for weight in weights], merged)
        found_input, found = merged.params.backward(grad_output, input, total, needs_input=True, needs_weight=True)
        cropped = [five.take(found, merged, k) for k, weight in enumerate(weights) if weight is not None]
        pairs = [(five.after(input, weights, merged), output), (found_input, grad_input)]
        pairs += zip(cropped, grad_weights, strict=True)
        for k, weight in enumerate(weights):
            if weight is None:
                product = (grad_output * input).sum([0, *range(2, input.dim())])
                pairs.append((five.diagonal(five.take(found, merged, k), merged), product))
    return max(error(mine, autograd) for mine, autograd in pairs)


@pytest.mark.parametrize("name", SUMS)
def test_statement(name):
    assert difference(SUMS[name]) <= TOLERANCE


GRID = itertools.product((1, 2, 3), (1, 2), (1, 2), (1, 2, 4), (False, True))


@pytest.mark.parametrize(("rank", "stride", "dilation", "groups", "transposed"), list(GRID))
def test_statement_on_the_grid(rank, stride, dilation, groups, transposed):
    options = {"stride": stride, "dilation": dilation, "groups": groups, "transposed": transposed}
    branches = [branch(size, **options) for size in ((3, 3, 1)[:rank], (1, 3, 3)[:rank], (1,) * rank)]
    assert difference(branches) <= TOLERANCE


@pytest.mark.parametrize(
    ("branches", "reason"),
    [
        ([branch((3, 3)), branch((1, 1), stride=2)], "stride"),
        ([branch((3, 3)), branch((3, 3), groups=2)], "groups"),
        ([branch((3, 3)), branch((3, 3), transposed=True)], "transposed"),
        ([branch((3, 3)), branch((3, 3), dilation=2)], "places"),
        ([branch((3, 3)), Branch(params((0, 0)), (3, 3))], "places"),
        ([branch((3, 3), dilation=2), Branch(params((1, 1)), (1, 1))], "places"),
        ([branch((3, 3)), branch((2, 2))], "places"),
        ([branch((3, 3), stride=2), itself(2)], "strided"),
        ([branch((3, 3), transposed=True), itself(2)], "transposed"),
    ],
)
def test_what_cannot_be_merged(branches, reason):
    assert reason in merge(branches)


def cropped_at_the_corner(weight, merged, branch):
    kernel = [size - 2 * pad for size, pad in zip(merged.kernel, merged.pads[branch][::-2], strict=True)]
    return weight[(slice(None), slice(None), *(slice(size) for size in kernel))]


def of_the_first_group(like, merged):
    channels = like.shape[0]
    return torch.eye(channels, channels // merged.params.groups, dtype=like.dtype)


@pytest.mark.parametrize(
    ("name", "mutant", "branches"),
    [("take", cropped_at_the_corner, "repvgg"), ("_eye", of_the_first_group, "grouped")],
)
def test_mutant_fails(name, mutant, branches, monkeypatch):
    monkeypatch.setattr(five, name, mutant)
    assert difference(SUMS[branches]) > 0.1

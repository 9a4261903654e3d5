"""Auxiliary heads: their width, their size, and that they cost little."""

import re

import pytest
import torch

from convbn_compile.local_learning import auxiliary_head
from convbn_compile.local_learning._heads import width
from convbn_compile.measure import saved_for_backward


@pytest.mark.parametrize(
    ("channels", "filters"), [(1, 16), (8, 16), (63, 32), (64, 64), (100, 64), (512, 256), (2048, 256)]
)
def test_width(channels, filters):
    assert width(channels) == filters
    convolution = auxiliary_head((channels, 8, 8), 10)[0][1]
    assert (convolution.in_channels, convolution.out_channels) == (channels, filters)


@pytest.mark.parametrize("shape", [(8, 32, 32), (8, 7, 5), (8, 1, 1), (12,)])
def test_output(shape):
    assert auxiliary_head(shape, 5)(torch.randn(3, *shape)).shape == (3, 5)


def test_fixed_filters_look_at_the_whole_map():
    head = auxiliary_head((64, 32, 32), 10, 256)
    seen = []
    head[0][1].register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].shape[2:], output.shape[1])))
    head(torch.randn(2, 64, 32, 32))
    assert seen == [((32, 32), 256)]


def test_adaptive_heads_save_little():
    x = torch.randn(4, 64, 32, 32, requires_grad=True)
    heads = {filters: auxiliary_head((64, 32, 32), 10, filters) for filters in (None, 256)}
    adaptive, classic = (saved_for_backward(head, head, x) for head in heads.values())
    assert adaptive < 0.1 * classic
    assert adaptive < x.nbytes


@pytest.mark.parametrize("arguments", [((8, 8, 8), 0), ((8, 8, 8), 4, 0), ((0, 8, 8), 4), ((8.0, 8, 8), 4), ("888", 4)])
def test_numbers_that_no_head_has(arguments):
    with pytest.raises((TypeError, ValueError), match="an integer of 1 or more is needed"):
        auxiliary_head(*arguments)


def test_a_shape_that_no_head_fits():
    with pytest.raises(ValueError, match=re.escape("needs features of shape [C, H, W] or [C], got [3, 4].")):
        auxiliary_head((3, 4), 10)

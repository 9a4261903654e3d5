"""The Partitioner: its rule, written down again, and its bounds on random networks."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convbn_compile.local_learning._lines import UnitProfile
from convbn_compile.local_learning.partitioner import Partitioner


def unit(name, resident, passing, slope, input_bytes=0, before=0):
    """All in bytes."""
    return UnitProfile(name, (1,), input_bytes, 1, resident, (), resident + passing, slope, before=before)


def partitioner(budget=1000, margin=0.0, limit=512, similarity=0.4):
    return Partitioner(budget, margin, limit, similarity)


def groups(plan):
    return [(block.names, block.batch_size) for block in plan.blocks]


def test_the_batch_fills_the_budget():
    plan = partitioner().plan([unit("a", 100, 50, 10)])
    assert groups(plan) == [(("a",), 85)]
    assert plan.blocks[0].predicted == 1000
    assert plan.blocks[0].resident == 100


def test_a_margin_is_left_free():
    assert groups(partitioner(margin=0.1).plan([unit("a", 100, 50, 10)])) == [(("a",), 75)]


def test_what_is_before_a_block_counts_once():
    """Units of the block itself are in what is resident."""
    units = [unit("a", 0, 0, 10), unit("b", 100, 50, 10, before=400), unit("c", 30, 50, 10, before=500)]
    plan = partitioner().plan(units)
    assert groups(plan) == [(("a",), 100), (("b", "c"), 42)]
    assert [(block.resident, block.predicted) for block in plan.blocks] == [(0, 1000), (530, 1000)]


def test_a_unit_that_does_not_fit_beside_those_before_it():
    message = "which takes 2.00 MiB with 1.50 of the units before it beside .* The least budget for it is 2.00 MiB"
    with pytest.raises(ValueError, match=message):
        partitioner(2**20).plan([unit("a", 2**19, 0, 1), unit("b", 2**19, 0, 1, before=3 * 2**19 - 1)])


def test_like_units_are_a_block_whose_residents_add_up():
    plan = partitioner().plan([unit("a", 100, 50, 10), unit("b", 100, 50, 9)])
    assert groups(plan) == [(("a", "b"), 75)]
    assert plan.blocks[0].predicted == 200 + 50 + 750


def test_the_input_of_a_block_is_there_beside_those_of_its_units():
    units = [unit("a", 0, 0, 10, 4), unit("b", 0, 0, 8, 3)]
    assert groups(partitioner().plan(units)) == [(("a", "b"), 83)]
    assert groups(partitioner(similarity=0).plan(units)) == [(("a",), 100), (("b",), 125)]


def test_unlike_units_are_blocks():
    plan = partitioner().plan([unit("a", 10, 0, 10), unit("b", 10, 0, 4), unit("c", 10, 0, 4)])
    assert groups(plan) == [(("a",), 99), (("b", "c"), 245)]
    assert [list(block.units) for block in plan.blocks] == [[0], [1, 2]]


def test_a_block_is_split_where_its_residents_would_shrink_the_batch():
    units = [unit(name, 200, 0, 10) for name in "abcd"]
    assert groups(partitioner().plan(units)) == [(("a", "b"), 60), (("c", "d"), 60)]


def test_similarity_is_how_far_batches_may_differ():
    units = [unit("a", 0, 0, 10), unit("b", 0, 0, 5)]
    assert len(partitioner(similarity=0.9).plan(units).blocks) == 2
    assert len(partitioner(similarity=1.0).plan(units).blocks) == 1


def test_the_largest_batch_is_limited():
    assert groups(partitioner(limit=7).plan([unit("a", 0, 0, 1)])) == [(("a",), 7)]
    assert groups(partitioner(limit=7).plan([unit("a", 0, 0, 0.0)])) == [(("a",), 7)]


def test_one_image_that_does_not_fit():
    units = [unit("a", 0, 0, 10), unit("b", 2**20, 0, 2**20), unit("c", 2**19, 0, 2**20)]
    message = (
        "memory_budget: unit b does not fit into 1.00 MiB with a single image, which takes 2.00 MiB beside a margin of "
        "20 %. The least budget for it is 2.50 MiB."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        partitioner(2**20, margin=0.2).plan(units)
    assert groups(partitioner(5 * 2**19, margin=0.2).plan(units))[1] == (("b",), 1)


def test_the_least_budget_is_enough():
    units = [unit("a", 0, 0, 2**20 + 4321)]
    with pytest.raises(ValueError, match="The least budget") as raised:
        partitioner(2**20).plan(units)
    least = float(re.search(r"for it is ([0-9.]+) MiB", str(raised.value))[1])
    assert groups(partitioner(int(least * 2**20)).plan(units)) == [(("a",), 1)]


def test_it_prints():
    printed = str(partitioner(2**20, margin=0.1).plan([unit("first", 0, 0, 4096), unit("second", 0, 0, 4096)]))
    assert "1.00 MiB, of which 10 % are left free" in printed
    assert re.search(r"0 +first to second +2 +230", printed)


sizes = st.floats(0, 400)
networks = st.lists(
    st.tuples(sizes, sizes, st.floats(0, 150), st.integers(0, 50), st.integers(0, 100)), min_size=1, max_size=8
)


@settings(max_examples=200, deadline=None)
@given(networks, st.floats(0, 2), st.sampled_from([0.0, 0.1]))
def test_every_block_fits(network, similarity, margin):
    units = [unit(str(index), int(resident), *line) for index, (resident, *line) in enumerate(network)]
    plan = partitioner(1200, margin, 64, similarity).plan(units)
    assert [name for block in plan.blocks for name in block.names] == [each.name for each in units]
    for block in plan.blocks:
        members = [units[index] for index in block.units]
        resident = members[0].before + sum(each.resident for each in members)
        slopes = [
            each.slope + (index > block.first) * members[0].input_bytes
            for index, each in enumerate(members, block.first)
        ]
        needed = [
            resident + each.intercept - each.resident + slope * block.batch_size
            for each, slope in zip(members, slopes, strict=True)
        ]
        assert max(needed) <= 1200 * (1 - margin) + 1e-6
        assert 1 <= block.batch_size <= 64
        assert max(needed) <= block.predicted < max(needed) + 1 + 1e-6
        larger = max(need + slope for need, slope in zip(needed, slopes, strict=True))
        assert block.batch_size == 64 or larger > 1200 * (1 - margin) - 1e-6

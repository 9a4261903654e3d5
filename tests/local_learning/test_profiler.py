"""The Profiler: lines of bytes by batch size, what they are of, and that nothing is changed by measuring."""

import re
from dataclasses import replace

import pytest
import torch
import torchvision
from local_learning.networks import CLASSES, flux, images, uncompiled, values
from torch import nn

from convbn_compile.local_learning import NeuroFlux, _planning
from convbn_compile.local_learning._lines import Profile, UnitProfile, checked, fitted
from convbn_compile.local_learning.profiler import _extended


def made(*points, resident=0):
    return fitted(UnitProfile("unit", (1,), 4, 1, resident, points))


def vgg(build, classes=10):
    """For images of 32 pixels."""
    model = build(num_classes=classes)
    model.avgpool, model.classifier = nn.Identity(), nn.Linear(512, classes)
    return model


def test_vgg16_is_linear(tmp_path):
    run = NeuroFlux(vgg(torchvision.models.vgg16_bn), 10, "160MiB", tmp_path, batch_size_limit=16)
    with uncompiled():
        found = run.profile(torch.randn(2, 3, 32, 32), progress=False)
    assert len(found.units) == 13
    assert all(unit.r2 > 0.99 and unit.linear for unit in found.units)
    assert all([batch for batch, _ in unit.points] == [2, 4, 8, 16] for unit in found.units)
    slopes = [unit.slope for unit in found.units]
    assert max(slopes) == max(slopes[:2])
    assert slopes[-1] < 0.05 * slopes[0]


def test_points_on_a_line():
    profile = made((2, 120), (4, 140), (8, 180))
    assert (profile.intercept, profile.slope, profile.r2) == pytest.approx((100, 10, 1))
    assert profile.linear
    assert profile.at(3) == pytest.approx(130)
    assert profile.largest(1000) == pytest.approx(90)


def test_a_bend_is_reported_and_nothing_is_above_the_line():
    points = (2, 100), (4, 101), (8, 102), (16, 103), (512, 900), (600, 5000)
    profile = made(*points)
    assert profile.r2 < 0.99
    assert not profile.linear
    assert all(profile.at(batch) >= size - 1e-6 for batch, size in points)
    assert "not linear: " in str(Profile((profile,)))


def test_bytes_that_do_not_grow():
    profile = made((2, 100), (4, 100), (8, 100))
    assert (profile.intercept, profile.slope, profile.r2) == (100, 0, 1)


def test_a_point_where_the_budget_ends():
    profile = _extended(made((2, 120), (4, 140), (8, 180)), lambda batch: 100 + 10 * batch, 1000, 512)
    assert profile.points == ((2, 120), (4, 140), (8, 180), (90, 1000))
    assert _extended(profile, lambda batch: 100 + 10 * batch, 1000, 30).points[-1] == (30, 400)


def test_no_point_beyond_the_budget():
    first = made((2, 120), (4, 140), (8, 180))
    assert _extended(first, lambda batch: 1 // 0, 170, 512) == first


def test_more_points_where_there_is_no_line():
    def bytes_at(batch):
        return 100 + 10 * batch + 50 * max(0, batch - 20) ** 2

    profile = _extended(made(*((batch, bytes_at(batch)) for batch in (2, 4, 8))), bytes_at, 500, 512)
    assert [batch for batch, _ in profile.points] == [2, 4, 8, 24, 40]
    assert not profile.linear
    assert all(profile.at(batch) >= size - 1e-6 for batch, size in profile.points)


def test_bytes_are_those_of_a_step(tmp_path):
    """The tensors of a step, added up by hand, are the least that it takes."""
    run = flux(tmp_path, memory_budget="10MiB", optimizer=torch.optim.Adam)
    with uncompiled():
        profile = run.profile(images()[:2][0], progress=False).units[0]
    unit = run._network.units[0]
    parameters = sum(one.nbytes for one in unit.parameters())
    buffers = sum(one.nbytes for one in unit.buffers())
    assert profile.input_bytes == 4 * 3 * 8 * 8
    steps = 4 * len(list(unit.parameters()))
    assert profile.resident == 3 * parameters + buffers + steps
    batch, size = profile.points[-1]
    maps = 4 * batch * 8 * 8 * 8  # of 8 channels
    assert size >= profile.resident + 4 * batch * 3 * 8 * 8 + 3 * maps  # the input; conv, norm, relu
    assert size <= profile.resident + parameters + 8 * maps


def test_nothing_is_changed(tmp_path):
    run, state = flux(tmp_path), torch.get_rng_state()
    run._build(images()[:2][0])
    run._network.units[1].eval()
    before, modes = values(run), [module.training for unit in run._network.units for module in unit.modules()]
    with uncompiled():
        run.profile(images()[:2][0], progress=False)
    assert all(torch.equal(value, before[name]) for name, value in values(run).items())
    assert [module.training for unit in run._network.units for module in unit.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for unit in run._network.units for parameter in unit.parameters())


def test_it_prints_and_plots(tmp_path):
    run = flux(tmp_path)
    with uncompiled():
        profile = run.profile(images()[:2][0], progress=False)
    assert re.search(r"unit +output +parameters +p MiB +q MiB/image +R² +batches", str(profile))
    assert "8x8x8" in str(profile)
    profile.plot(tmp_path / "profile.png")
    assert (tmp_path / "profile.png").stat().st_size > 1000


def test_example_has_to_be_a_tensor(tmp_path):
    with pytest.raises(
        TypeError, match=re.escape("profile: example must be a tensor of images [N, C, H, W], got [1] (list).")
    ):
        flux(tmp_path).profile([1])


def test_a_new_shape_makes_new_heads(tmp_path):
    run = flux(tmp_path)
    with uncompiled():
        run.profile(torch.randn(2, 3, 8, 8), progress=False)
        heads = [unit.head for unit in run._network.units]
        run.profile(torch.randn(5, 3, 8, 8), progress=False)
        assert [unit.head for unit in run._network.units] == heads
        run.profile(torch.randn(2, 3, 16, 16), progress=False)
    assert run._network.units[0].head is not heads[0]
    assert run._network.units[-1].head(torch.randn(1, 16, 4, 4)).shape == (1, CLASSES)


def test_a_mutant_of_the_line():
    """A line that is not raised has a point above."""
    profile = made((2, 100), (4, 101), (8, 102), (16, 103), (512, 900), (600, 5000))
    lower = replace(profile, margin=0.0)
    assert any(lower.at(batch) < size for batch, size in profile.points)


def test_a_plan_is_checked_by_steps(tmp_path, monkeypatch):
    """A step that takes more than its line raises the line, until no step does."""
    run = flux(tmp_path)
    with uncompiled():
        run.profile(images()[:2][0], progress=False)
        planned = run.plan()
        lines = _planning._checked(planned, run._network, run._profile.units, run.optimizer, run.device)
        for block in planned.blocks:
            assert all(block.batch_size in dict(lines[index].points) for index in block.units)
        monkeypatch.setattr(_planning, "checked", lambda unit, batch, size: checked(unit, batch, size + 20_000))
        lower = run.plan()
    assert lower.blocks != planned.blocks
    assert min(block.batch_size for block in lower.blocks) < min(block.batch_size for block in planned.blocks)


def test_a_point_above_the_line():
    profile = made((2, 120), (4, 140), (8, 180))
    above = checked(profile, 6, 200)
    assert (above.at(6), above.margin) == (pytest.approx(200), pytest.approx(40))
    assert above.linear
    assert "MiB added" in str(Profile((above,)))
    assert checked(profile, 6, 100).margin == 0

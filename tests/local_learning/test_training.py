"""Training: what local learning computes, caches, exits, memory, and what a run reports."""

import copy
import logging
import math
import re
import time
from collections import OrderedDict
from dataclasses import replace
from functools import partial

import numpy
import pytest
import torch
from local_learning.networks import (
    CLASSES,
    EAGER,
    IMAGES,
    fitted,
    flux,
    images,
    network,
    profiled_as,
    uncompiled,
    values,
)
from local_learning.networks import unit as conv_unit
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from convbn_compile import lowering
from convbn_compile.local_learning._local import LocalUnit, resident_bytes, seed_of
from convbn_compile.local_learning._reported import chosen_exit
from convbn_compile.local_learning._source import Images
from convbn_compile.local_learning._units import Unit
from convbn_compile.local_learning.report import Exit
from convbn_compile.local_learning.worker import Worker


def differences(first, second):
    return [name for name, value in values(first).items() if not torch.equal(value, values(second)[name])]


def test_it_is_local_learning(tmp_path):
    """One block against the method written down again: a loss for each unit, and nothing goes back through it."""
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    run = profiled_as(flux(tmp_path, optimizer=sgd), 20, 20, 20)
    expected = [copy.deepcopy(unit).train() for unit in run._network.units]
    momentum = [[torch.zeros_like(one) for one in unit.parameters()] for unit in expected]
    with uncompiled():
        run.fit(images(), images(24, 2), 2, progress=False)
    assert len(run._plan.blocks) == 1
    for epoch in range(2):
        torch.manual_seed(seed_of(0, 0, epoch, 0))
        for step, chosen in enumerate(torch.randperm(IMAGES).split(20)):
            done = (epoch * 3 + step + 0.5) / 6
            lr = 0.1 * min(1, 10 * done) * (1 + math.cos(math.pi * done)) / 2
            x, target = images()[chosen]
            for local, before in zip(expected, momentum, strict=True):
                output = local.unit(x)
                gradients = torch.autograd.grad(F.cross_entropy(local.head(output), target), list(local.parameters()))
                with torch.no_grad():
                    for parameter, gradient, velocity in zip(local.parameters(), gradients, before, strict=True):
                        velocity.mul_(0.9).add_(gradient)
                        parameter.sub_(lr * velocity)
                x = output.detach()
    for unit, reference in zip(run._network.units, expected, strict=True):
        torch.testing.assert_close(unit.state_dict(), reference.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lowering", ["aot_eager", "inductor"])
def test_compiled_steps_are_eager_steps(lowering):
    torch.manual_seed(0)
    unit = (
        LocalUnit(Unit("0", network()[0]), nn.Sequential(nn.Flatten(), nn.Linear(8 * 64, CLASSES)), EAGER)
        .double()
        .train()
    )
    eager = copy.deepcopy(unit)
    for batch in (2, 5, 20):  # one graph for all of them
        x, target = images()[:batch]
        results = []
        for each, compiled in ((unit, True), (eager, False)):
            optimizer = torch.optim.SGD(each.trained(), lr=0.1)
            if compiled:
                results.append(each.step(x.double(), target, optimizer))
            else:
                with uncompiled():
                    results.append(each.step(x.double(), target, optimizer))
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(unit.state_dict(), eager.state_dict(), rtol=1e-10, atol=1e-10)


def test_a_block_is_compiled_once_for_all_batches(tmp_path, monkeypatch):
    run, graphs = flux(tmp_path, batch_size_limit=14, memory_budget="1MiB"), []
    compiled = lowering.lower
    monkeypatch.setattr(
        "convbn_compile.backend.lower", lambda *args, **kwargs: graphs.append(1) or compiled(*args, **kwargs)
    )
    run.fit(images(), images(24, 2), 1, progress=False)
    assert len(graphs) == 3
    assert all(8 < block.batch_size <= 14 for block in run._plan.blocks)


def test_each_of_many_units_is_compiled(tmp_path, monkeypatch):
    """Dynamo has a limit for all of them, and before torch 2.13 it is below their number by default."""
    graphs = []
    lower = lowering.lower
    monkeypatch.setattr(
        "convbn_compile.backend.lower", lambda *args, **kwargs: graphs.append(1) or lower(*args, **kwargs)
    )
    units = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(10)]
    run = flux(tmp_path, [*units, nn.Linear(4, CLASSES)], memory_budget="1MiB")
    with torch._dynamo.config.patch(accumulated_recompile_limit=5):
        run.profile(torch.randn(2, 4), progress=False)
    assert len(graphs) == 10


def test_a_cached_run_is_the_recomputed_run(tmp_path):
    """Bit for bit, with the same plan; the weights before count in that of cache="never"."""
    cached, recomputed = flux(tmp_path / "a", cache="always"), flux(tmp_path / "b", cache="never")
    for run in (cached, recomputed):
        profiled_as(run, 9, 14, 20)
    with uncompiled():
        for run in (cached, recomputed):
            run.fit(images(), images(24, 2), 2, progress=False)
    sources = [[block.source for block in run._report.blocks] for run in (cached, recomputed)]
    assert sources == [["data", "cache", "cache"], ["data", "recomputed", "recomputed"]]
    assert not differences(cached, recomputed)
    assert cached.exits() == recomputed.exits()


def test_recomputing_counts_the_weights_before(tmp_path):
    """Those of units, whose heads are not needed any more, and not of what comes later."""
    caching, recomputing = flux(tmp_path, cache="always"), flux(tmp_path, cache="never")
    for run in (caching, recomputing):
        profiled_as(run, 9, 14, 20)
    weights = [resident_bytes(unit.unit) for unit in caching._network.units]
    with uncompiled():
        plans = [run.plan() for run in (caching, recomputing)]
    both = zip(*(plan.blocks for plan in plans), strict=True)
    added = [without.resident - with_cache.resident for with_cache, without in both]
    assert added == [0, weights[0], weights[0] + weights[1]]


@pytest.mark.parametrize("double", [False, True])
def test_a_choice_that_is_measured_changes_no_values(tmp_path, monkeypatch, double):
    """What is computed again is rounded as a cache of it would be."""
    from convbn_compile.local_learning import _inputs

    runs = []
    given = {"data": images(double=double), "val": images(24, 2, double=double)}
    narrow = {"cache_dtype": torch.float32 if double else torch.float16}
    for choices in ("cache cache", "recomputed recomputed", "cache recomputed", "recomputed cache"):
        made = iter(choices.split())
        monkeypatch.setattr(_inputs, "choose", lambda _, made=made: (next(made), "chosen"))
        model = [module.double() if double else module for module in network()]
        runs.append(fitted(tmp_path / choices, model=model, **given, **narrow))
        assert [block.source for block in runs[-1]._report.blocks[1:]] == choices.split()
    for run in runs[1:]:
        assert not differences(runs[0], run)
        assert run.exits() == runs[0].exits()
    exact = fitted(
        tmp_path / "never",
        model=[module.double() if double else module for module in network()],
        cache="never",
        **given,
    )
    assert differences(runs[0], exact)


def test_what_is_never_cached_is_not_rounded(tmp_path):
    """Of augmented images there is no cache."""
    runs = [
        fitted(tmp_path / str(dtype), data=Augmented(), cache_dtype=dtype, epochs=1)
        for dtype in (torch.float32, torch.float16)
    ]
    assert not differences(*runs)


def test_values_beyond_a_cache_that_is_computed_again(tmp_path, monkeypatch):
    from convbn_compile.local_learning import _inputs

    monkeypatch.setattr(_inputs, "choose", lambda _: ("recomputed", ""))
    modules = network()
    modules[0][1].weight.data.fill_(1e6)
    with pytest.raises(ValueError, match="cache_dtype: a cache is to hold .*, which is beyond torch.float16"):
        fitted(tmp_path, model=modules, cache_dtype=torch.float16, epochs=1)


class Inverse(nn.Module):
    """Beyond float16 where an image is 0."""

    def forward(self, x):
        return x / (x.abs().mean((1, 2, 3), keepdim=True) + 1e-9) + 1e-5 / (
            x.square().mean((1, 2, 3), keepdim=True) + 1e-12
        )


def test_only_images_are_looked_at_for_what_a_cache_holds(tmp_path, monkeypatch):
    """And nothing that a batch is filled up with."""
    from convbn_compile.local_learning import _inputs

    monkeypatch.setattr(_inputs, "choose", lambda _: ("recomputed", ""))
    first, *others = network()
    assert fitted(
        tmp_path, model=[nn.Sequential(Inverse(), first[0], nn.ReLU()), *others], cache_dtype=torch.float16, epochs=1
    ).exits()


def test_a_mutant_of_the_cache_is_seen(tmp_path, monkeypatch):
    from convbn_compile.local_learning._cache import CacheWriter

    right = fitted(tmp_path / "a", cache="always")
    append = CacheWriter.append
    monkeypatch.setattr(CacheWriter, "append", lambda self, rows: append(self, rows * (1 + 1e-6)))
    assert differences(right, fitted(tmp_path / "b", cache="always"))


def test_a_cache_of_half_precision_is_near(tmp_path):
    whole, half = (
        fitted(tmp_path / "a", cache="always"),
        fitted(tmp_path / "b", cache="always", cache_dtype=torch.float16),
    )
    name = "1.unit.0.weight"
    assert 0 < (values(whole)[name] - values(half)[name]).abs().max() < 1e-2


class Augmented(Dataset):
    def __len__(self):
        return IMAGES

    def __getitem__(self, index):
        x, target = images()[index]
        return x + 0.1 * torch.randn_like(x), target


def test_augmented_images_are_not_cached(tmp_path, caplog):
    caplog.set_level(logging.INFO, "convbn_compile.local_learning")
    run = fitted(tmp_path, data=Augmented())
    assert [block.source for block in run._report.blocks] == ["data", "recomputed", "recomputed"]
    assert "images are augmented, and a cache would hold one draw" in caplog.text


def test_measured_bytes_are_within_the_budget(tmp_path):
    for budget in (110_000, 150_000, 300_000):
        run = flux(tmp_path / str(budget), memory_budget=budget)
        with uncompiled():
            run.fit(images(), images(24, 2), 1, progress=False)
        for block in run._report.blocks:
            assert 0.3 * block.predicted < block.measured <= budget
        assert run._report.peak == max(block.measured for block in run._report.blocks)


def test_it_learns(tmp_path):
    run = fitted(tmp_path, epochs=8)
    assert max(each.accuracy for each in run.exits()) > 0.9


def test_exits(tmp_path):
    run = fitted(tmp_path, epochs=4, exit_tolerance=0.05)
    found, data = run.exits(), images(24, 2)
    assert [each.name for each in found] == ["0", "1", "2"]
    for each in found:
        model = run.export(each.unit)
        assert not any(module.training for module in model.modules())
        assert each.parameters == sum(parameter.numel() for parameter in model.parameters())
        with torch.no_grad():
            right = (model(data[:][0]).argmax(1) == data[:][1]).float().mean().item()
        assert right == pytest.approx(each.accuracy)
    best = max(each.accuracy for each in found)
    chosen = next(each for each in found if each.accuracy >= best - 0.05)
    assert run._report.chosen == chosen
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(run.export()(x), run.export(chosen.name)(x))
        whole = nn.Sequential(*(unit.unit for unit in run._network.units), run._network.units[-1].head)
        assert torch.equal(run.export("last")(x), whole(x))


def test_the_earliest_exit_that_is_good_enough():
    exits = [Exit(unit, str(unit), accuracy, 1) for unit, accuracy in enumerate([0.5, 0.88, 0.9, 0.9, 0.4])]
    chosen = {tolerance: chosen_exit(exits, tolerance).unit for tolerance in (0.0, 0.01, 0.03, 0.5)}
    assert chosen == {0.0: 2, 0.01: 2, 0.03: 1, 0.5: 0}


def test_what_is_exported_is_a_copy(tmp_path):
    run = fitted(tmp_path, epochs=1)
    own = {id(one) for unit in run._network.units for one in unit.parameters()}
    assert not own & {id(one) for one in run.export().parameters()}


def test_the_model_itself_is_trained(tmp_path):
    modules = network()
    before = [module[0].weight.clone() for module in modules[:3]]
    run = fitted(tmp_path, model=modules, epochs=1)
    assert not any(torch.equal(module[0].weight, old) for module, old in zip(modules, before, strict=False))
    assert run.export("last")[0][0].weight.equal(modules[0][0].weight)


def test_frozen_parameters_stay(tmp_path):
    modules = network()
    modules[1][0].requires_grad_(requires_grad=False)
    before = modules[1][0].weight.clone()
    fitted(tmp_path, model=modules, epochs=1)
    assert torch.equal(modules[1][0].weight, before)


def test_fewer_images_than_a_batch(tmp_path):
    run = fitted(tmp_path, data=images(7), epochs=1)
    assert [block.batch_size for block in run._report.blocks] == [7]


def test_learning_rates_go_with_the_root_of_the_batch():
    unit = LocalUnit(Unit("0", network()[0]), nn.Linear(1, 1), EAGER)
    worker = Worker([unit], lambda params: torch.optim.SGD(params, lr=0.1), 32, 128, 2)
    found = []
    for progress in (0.0, 0.05, 0.5, 1.0):
        worker._set_lr(progress)
        found.append(worker.optimizers[0].param_groups[0]["lr"])
    assert found == pytest.approx([0.0, 0.025 * math.cos(math.pi / 40) ** 2, 0.025, 0.0])


def test_dropout_and_the_seed(tmp_path):
    runs = []
    for number in range(2):
        model = network(dropout=0.5)
        torch.manual_seed(number)  # of the user's own
        runs.append(fitted(tmp_path / str(number), model=model, epochs=1))
    first, second = runs
    assert not differences(first, second)
    assert differences(first, fitted(tmp_path / "other", model=network(dropout=0.5), epochs=1, seed=1))


def test_random_numbers_of_others_are_left_alone(tmp_path):
    state = torch.get_rng_state()
    run = flux(tmp_path)
    data = images()
    torch.set_rng_state(state)
    with uncompiled():
        run.fit(data, images(24, 2), 1, progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_report(tmp_path, caplog):
    caplog.set_level(logging.INFO, "convbn_compile.local_learning")
    run = fitted(tmp_path, epochs=1, cache="always")
    printed = str(run._report)
    assert re.search(r"block +units +batch size +MiB predicted +MiB measured +seconds +input", printed)
    assert re.search(r"exit +accuracy +parameters", printed)
    assert f"Exit {run._report.chosen.name}: " in printed
    assert run._report.to_dict()["blocks"][0]["names"] == ("0",)
    for line in ("block 1: its input is cached: ", "block 0, epoch 0: losses ", "; accuracies "):
        assert line in caplog.text


def test_throughput_is_that_of_the_exit_beside_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr("convbn_compile.local_learning._reported._seconds", lambda model, _: float(len(model)))
    report = fitted(tmp_path, epochs=1, exit_tolerance=0.99)._report
    assert (report.chosen.unit, report.throughput) == (0, 2.0)  # a unit and its head, beside three and the classifier


def test_throughput_is_of_the_fastest_calls(tmp_path, monkeypatch):
    times = iter([5.0, 9.0, 1.0, 8.0, 4.0, 2.0, 3.0, 7.0, 6.0, 4.0])
    seen = []
    monkeypatch.setattr(
        "convbn_compile.local_learning._reported._seconds",
        lambda model, x: (
            seen.append((len(model), len(x), any(each.training for each in model.modules()))) or next(times)
        ),
    )
    assert fitted(tmp_path, epochs=1, exit_tolerance=0.99)._report.throughput == 2.0
    assert seen == [(2, 9, False), (4, 9, False)] * 5


def test_throughput_is_measured_once(tmp_path, monkeypatch):
    first = fitted(tmp_path, epochs=1, exit_tolerance=0.99)._report
    monkeypatch.setattr("convbn_compile.local_learning._reported._seconds", lambda *_: 1 / 0)
    assert fitted(tmp_path, epochs=1, exit_tolerance=0.99)._report == first


def test_the_whole_network_is_as_fast_as_itself(tmp_path):
    model = [nn.Sequential(*network()[:3]), network()[3]]
    run = profiled_as(flux(tmp_path, model), 20)
    with uncompiled():
        assert run.fit(images(), images(24, 2), 1, progress=False).throughput == 1.0


class Dropping(nn.Sequential):
    """As models of timm drop: by their own mode, by a function."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


def test_the_network_itself_is_in_eval_mode(tmp_path):
    run = fitted(tmp_path, model=Dropping(*network()), epochs=1)
    model, x = run._units.model, images()[:][0]
    with torch.no_grad():
        assert torch.equal(model(x), run.export("last")(x))


def test_steps_are_compiled_with_batch_statistics(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "convbn_compile._torch.compile_for_any_batch", lambda function, **settings: asked.append(settings) or function
    )
    flux(tmp_path, options={**EAGER, "memory_budget": 0.5}).profile(images()[:2][0], progress=False)
    options = {**EAGER, "memory_budget": 0.5, "mode": "train"}
    assert asked == [{"backend": "convbn_tune", "options": options}] * 3


def test_seconds_of_blocks_are_their_own(tmp_path):
    began = time.perf_counter()
    report = fitted(tmp_path, epochs=3)._report
    assert 0 < sum(block.seconds for block in report.blocks) <= time.perf_counter() - began


def test_above_the_budget_is_told(tmp_path, caplog):
    fitted(tmp_path, epochs=1, memory_budget=100_000)
    assert re.search(r"block 0 took 0\.\d\d MiB, above the budget of 0\.10", caplog.text)


def test_history(tmp_path):
    report = fitted(tmp_path, epochs=3)._report
    assert [(each["block"], each["epoch"]) for each in report.history] == [(k, e) for k in range(3) for e in range(3)]
    seconds = [each["seconds"] for each in report.history]
    assert seconds == sorted(seconds)
    assert 0.5 * report.seconds < seconds[-1] <= report.seconds
    assert [each["accuracies"][0] for each in report.history[2::3]] == [each.accuracy for each in report.exits]
    best = max(each["accuracies"][0] for each in report.history)
    first = next(each for each in report.history if each["accuracies"][0] == best)
    assert report.seconds_to(best) == first["seconds"]
    assert replace(report, history=report.history[:0]).seconds_to(best) is None
    for wrong in (97, -0.1, float("nan"), "most"):
        with pytest.raises(ValueError, match="accuracy is a share of images, from 0 to 1, got"):
            report.seconds_to(wrong)


def test_nothing_is_left_of_caches(tmp_path):
    fitted(tmp_path, cache="always", epochs=1)
    names = sorted(file.name for file in tmp_path.glob("[!.]*"))
    assert names == ["block_0.pt", "block_1.pt", "block_2.pt", "manifest.json", "start.pt"]


def test_one_cache_at_a_time_and_the_next_is_committed_first(tmp_path, monkeypatch):
    from convbn_compile.local_learning.storage import Storage

    seen, commit = [], Storage.commit

    def look(self, manifest, needed):
        before = {file.name for file in tmp_path.glob("cache_*.npy")}
        commit(self, manifest, needed)
        seen.append((before, {file.name for file in tmp_path.glob("cache_*.npy")}))

    monkeypatch.setattr(Storage, "commit", look)
    fitted(tmp_path, cache="always", epochs=1)
    caches = [{f"cache_{number}_{split}.npy" for split in ("train", "val")} for number in range(2)]
    assert (caches[0] | caches[1], caches[1]) in seen
    assert all(len(after) <= 2 for _, after in seen)


def test_a_cache_is_a_file_of_numpy(tmp_path, monkeypatch):
    from convbn_compile.local_learning.worker import Worker

    seen, accuracies = [], Worker.accuracies

    def look(self, source, *more):
        seen.extend(numpy.load(file, mmap_mode="r") for file in sorted(tmp_path.glob("cache_0_*.npy")))
        return accuracies(self, source, *more)

    monkeypatch.setattr(Worker, "accuracies", look)
    run = fitted(tmp_path, cache="always", epochs=1)
    assert [(rows.shape, rows.dtype) for rows in seen[:2]] == [((60, 8, 8, 8), "float32"), ((24, 8, 8, 8), "float32")]
    with torch.no_grad():
        expected = run.export("last")[0](images()[:][0])
    torch.testing.assert_close(torch.from_numpy(seen[0].copy()), expected, rtol=1e-5, atol=1e-6)


def test_channels_last(tmp_path):
    modules = [module.to(memory_format=torch.channels_last) for module in network()]
    cached = fitted(tmp_path / "a", model=modules, cache="always", epochs=1)
    assert modules[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(value.isnan().any() for value in values(cached).values())


def test_a_dataset_of_lists_and_numbers(tmp_path):
    data = [(image, int(label)) for image, label in images()]
    whole, listed = fitted(tmp_path / "a", epochs=1), fitted(tmp_path / "b", epochs=1, data=data)
    assert not differences(whole, listed)


def test_float64(tmp_path):
    modules = [module.double() for module in network()]
    run = fitted(
        tmp_path, model=modules, cache="always", epochs=1, data=images(double=True), val=images(24, 2, double=True)
    )
    assert all(value.dtype in (torch.float64, torch.int64) for value in values(run).values())
    assert len(run.exits()) == 3


def test_labels_of_other_integers(tmp_path):
    x, target = images()[:]
    assert fitted(tmp_path, epochs=1, data=TensorDataset(x, target.to(torch.uint8))).exits()


def test_numpy_images(tmp_path):
    data = [(image.numpy(), int(label)) for image, label in images()]
    assert not differences(fitted(tmp_path / "a", epochs=1), fitted(tmp_path / "b", epochs=1, data=data))


class Flipped(Augmented):
    def __getitem__(self, index):
        x, target = images()[index]
        return x.flip(-1) if torch.rand(()) < 0.5 else x, target


def test_random_flips_are_found():
    assert all(Images("train", Flipped(), CLASSES).augments for _ in range(20))


def test_a_forced_cache_of_augmented_images_is_seeded(tmp_path):
    first, second = (fitted(tmp_path / str(run), data=Flipped(), cache="always", epochs=1) for run in range(2))
    assert not differences(first, second)


def test_gradients_of_before_do_not_count(tmp_path):
    modules, fresh = network(), fitted(tmp_path / "a", epochs=1)
    nn.Sequential(*modules).eval()(images()[:][0]).sum().backward()
    assert not differences(fresh, fitted(tmp_path / "b", model=modules, epochs=1))


def test_all_batches_are_run_by_the_same_kernels(tmp_path):
    """Written or computed again, with batches that differ and do not divide the images."""
    runs = []
    for cache in ("always", "never"):
        torch.manual_seed(0)
        classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, CLASSES))
        modules = [conv_unit(3, 64), conv_unit(64, 64, 2), conv_unit(64, 128, 2), classifier]
        changed = {"batch_size_limit": 64, "batches": (59, 31, 16), "epochs": 1}
        runs.append(fitted(tmp_path / cache, model=modules, cache=cache, **changed))
    assert not differences(*runs)


class Fetched:
    """A source that needs much to make little."""

    resident = 4

    def __len__(self):
        return 4

    def batches(self, indices):
        for each in indices:
            torch.zeros(10**6)
            yield images()[each]


def test_computing_a_batch_is_part_of_what_is_measured():
    local = LocalUnit(Unit("0", network()[0]), nn.Sequential(nn.Flatten(), nn.Linear(8 * 64, CLASSES)), EAGER)
    worker = Worker([local], partial(torch.optim.SGD, lr=0.1), 2, 128, 1)
    with uncompiled():
        worker.epoch(Fetched(), 0, (0,))
    assert 4 * 10**6 < worker.measured < 5 * 10**6


def test_recomputing_is_part_of_what_is_measured(tmp_path):
    run = profiled_as(flux(tmp_path, cache="never"), 9, 14, 20)
    with uncompiled():
        report = run.fit(images(), images(24, 2), 1, progress=False)
    (_, second, _), (_, unit, _) = report.blocks, run._network.units
    weights = sum(map(resident_bytes, (run._network.units[0].unit, unit)))
    momentum = sum(parameter.nbytes for parameter in unit.parameters())
    assert second.measured > weights + momentum + 14 * 4 * 8 * 8 * 8  # its input, beside all that is resident


def test_a_block_that_does_not_fit_beside_those_before_it_is_cached(tmp_path, monkeypatch):
    from convbn_compile.local_learning import _inputs

    seen = []
    monkeypatch.setattr(_inputs, "choose", lambda costs: seen.append(costs.fits) or ("recomputed", ""))
    for name, room in (("a", 1.0), ("b", 0.5)):
        run = profiled_as(flux(tmp_path / name), 9, 14, 20)
        blocks = [replace(block, predicted=int(room * run.memory_budget)) for block in run._plan.blocks]
        run._plan = replace(run._plan, blocks=tuple(blocks))
        with uncompiled():
            run.fit(images(), images(24, 2), 1, progress=False)
    assert seen == [False, False, True, True]


def test_images_that_cannot_be_cached_and_do_not_fit_are_warned_of(tmp_path, caplog):
    run = profiled_as(flux(tmp_path, cache="never"), 9, 14, 20)
    run._plan = replace(run._plan, blocks=tuple(replace(each, predicted=10**6) for each in run._plan.blocks))
    with uncompiled():
        run.fit(images(), images(24, 2), 1, progress=False)
    assert "block 1: with the blocks before it needs more than the budget" in caplog.text


def test_weights_before_count_once(tmp_path, caplog):
    """A plan of cache="never" has them, so that a block that fills it fits."""
    run = profiled_as(flux(tmp_path, cache="never"), 9, 14, 20)
    blocks = tuple(replace(block, predicted=run.memory_budget) for block in run._plan.blocks)
    run._plan = replace(run._plan, blocks=blocks)
    with uncompiled():
        run.fit(images(), images(24, 2), 1, progress=False)
    assert "needs more than the budget" not in caplog.text


def test_a_loss_that_is_not_finite_is_warned_of(tmp_path, caplog):
    fitted(tmp_path, epochs=1, optimizer=partial(torch.optim.SGD, lr=1e30))
    assert "unit 0: its loss is nan. Use an optimizer with a lower learning rate." in caplog.text


def test_another_profile_forgets_the_run(tmp_path):
    run = fitted(tmp_path, epochs=1)
    with uncompiled():
        run.profile(torch.randn(2, 3, 16, 16), progress=False)
    with pytest.raises(ValueError, match="There are no exits yet"):
        run.export()


def test_units_that_are_called_as_exits_are(tmp_path):
    first, second, third, head = network()
    modules = nn.Sequential(OrderedDict(last=first, best=second, other=third, head=head))
    run = fitted(tmp_path, model=modules, epochs=1)
    assert len(run.export("last")) == 4
    assert len(run.export("other")) == 4
    assert len(run.export(0)) == 2

"""Runs that are killed go on with the same result; caches that are damaged are made again."""

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from local_learning.networks import fitted, flux, images, network, stopped, uncompiled, values
from torch.utils.data import Dataset, TensorDataset

from convbn_compile.local_learning import neuroflux

KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
import torch
from local_learning.networks import fitted, network
from convbn_compile.local_learning.{module} import {owner}

left, method = {calls}, {owner}.{method}

def killing(*args, **kwargs):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return method(*args, **kwargs)

{owner}.{method} = killing
fitted({folder!r}, epochs=3, model=network(dropout=0.2), cache={cache!r})
"""
POINTS = {
    "in the second epoch of block 0": ("worker", "Worker", "_batch", 9, "always"),
    "while a cache is written": ("_cache", "CacheWriter", "append", 11, "always"),
    "after block 1, before the next cache": ("storage", "Storage", "commit", 10, "always"),
    "in the last block, whose input is computed again": ("worker", "Worker", "_batch", 37, "never"),
}


def killed(folder, point):
    """Run until the point."""
    module, owner, method, calls, cache = POINTS[point]
    script = KILLED.format(
        paths=[str(Path(__file__).parents[1])],
        folder=str(folder),
        module=module,
        owner=owner,
        method=method,
        calls=calls,
        cache=cache,
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return values(fitted(tmp_path_factory.mktemp("whole"), epochs=3, model=network(dropout=0.2), cache="always"))


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_goes_on(point, tmp_path, uninterrupted):
    killed(tmp_path, point)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["block"] < 3
    cache = POINTS[point][-1]
    run = fitted(tmp_path, epochs=3, model=network(seed=5, dropout=0.2), cache=cache)  # other values to begin with
    assert values(run).keys() == uninterrupted.keys()
    assert all(torch.equal(value, uninterrupted[name]) for name, value in values(run).items())
    assert len(run.exits()) == 3


def flipped(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def truncated(file):
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flipped, truncated, Path.unlink])
@pytest.mark.parametrize(("block", "epoch"), [(1, 1), (2, 0)])
def test_a_damaged_cache_is_made_again(damage, block, epoch, tmp_path, monkeypatch, uninterrupted, caplog):
    stopped(tmp_path, monkeypatch, block, epoch)
    damage(tmp_path / f"cache_{block - 1}_train.npy")
    run = fitted(tmp_path, epochs=3, model=network(dropout=0.2), cache="always")
    assert "the cache of train is missing or damaged: it is made again" in caplog.text
    assert all(torch.equal(value, uninterrupted[name]) for name, value in values(run).items())


def test_damaged_labels_are_made_again(tmp_path, monkeypatch, uninterrupted):
    stopped(tmp_path, monkeypatch, 1, 1)
    flipped(tmp_path / "labels_0_train.pt")
    run = fitted(tmp_path, epochs=3, model=network(dropout=0.2), cache="always")
    assert all(torch.equal(value, uninterrupted[name]) for name, value in values(run).items())


def test_what_is_reported_of_a_run_that_was_stopped(tmp_path, monkeypatch):
    """What was measured before counts, and so does the time that it took."""
    stopped(tmp_path, monkeypatch, 1, 1)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["seconds"] = 1000.0
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    report = fitted(tmp_path, epochs=3, model=network(dropout=0.2), cache="always")._report
    whole = fitted(tmp_path / "whole", epochs=3, model=network(dropout=0.2), cache="always")._report
    assert [block.measured for block in report.blocks] == [block.measured for block in whole.blocks]
    assert [block.seconds > 1000.0 for block in report.blocks] == [False, True, False]


def test_a_damaged_cache_of_half_precision(tmp_path, monkeypatch):
    """It is made again by way of the caches that there have been, so that it is rounded as it was."""
    half = {"cache_dtype": torch.float16}
    expected = values(fitted(tmp_path / "whole", epochs=3, model=network(dropout=0.2), cache="always", **half))
    stopped(tmp_path / "run", monkeypatch, 2, 0, **half)
    flipped(tmp_path / "run" / "cache_1_train.npy")
    run = fitted(tmp_path / "run", epochs=3, model=network(dropout=0.2), cache="always", **half)
    assert all(torch.equal(value, expected[name]) for name, value in values(run).items())


@pytest.mark.parametrize("file", ["start.pt", "block_0.pt", "checkpoint_1_0.pt"])
def test_damaged_values_are_an_error(file, tmp_path, monkeypatch):
    stopped(tmp_path, monkeypatch, 1, 1)
    flipped(tmp_path / file)
    with pytest.raises(ValueError, match=re.escape(f"{file} is missing or damaged")):
        fitted(tmp_path, epochs=3, model=network(dropout=0.2), cache="always")


def test_what_a_killed_run_left_behind_is_deleted(tmp_path, monkeypatch):
    stopped(tmp_path, monkeypatch, 1, 1)
    for name in ("cache_1_train.npy.new", "checkpoint_1_1.pt.new", "labels_7_val.pt"):
        (tmp_path / name).write_text("")
    (tmp_path / "mine.txt").write_text("")
    fitted(tmp_path, epochs=3, model=network(dropout=0.2), cache="always")
    names = sorted(file.name for file in tmp_path.glob("[!.]*"))
    assert names == ["block_0.pt", "block_1.pt", "block_2.pt", "manifest.json", "mine.txt", "start.pt"]


def test_a_run_that_is_done_is_loaded(tmp_path):
    first = fitted(tmp_path, epochs=1)
    again = fitted(tmp_path, epochs=1, model=network(seed=9))
    assert all(torch.equal(value, values(first)[name]) for name, value in values(again).items())
    assert again.exits() == first.exits()
    assert again._report.blocks == first._report.blocks


def with_groups(parameters):
    first, *others = parameters
    return torch.optim.SGD([{"params": [first], "lr": 9.0}, {"params": others}], 0.05, 0.9, weight_decay=5e-4)


def strided():
    """With parameters of the same shapes."""
    modules = network()
    modules[1][0].stride = (1, 1)
    return modules


def larger(number):
    return TensorDataset(torch.randn(number, 3, 16, 16), torch.arange(number) % 4)


DOUBLE = images(double=True)
DIFFERENT = {
    "epochs": ({}, 2, "holds a run with epochs = 1, here it is 2."),
    "seed": ({"seed": 3}, 1, "holds a run with seed = 0, here it is 3."),
    "memory_budget": ({"memory_budget": 10**6}, 1, "holds a run with memory_budget = 200000, here it is 1000000."),
    "optimizer": ({"optimizer": torch.optim.Adam}, 1, "holds a run with optimizer = \"SGD [{'params': 8, 'lr': 0.05, "),
    "cache": ({"cache": "never"}, 1, "holds a run with cache = 'auto', here it is 'never'."),
    "similarity": ({"similarity": 0.2}, 1, "holds a run with similarity = 0.1, here it is 0.2."),
    "margin": ({"margin": 0.2}, 1, "holds a run with margin = 0.1, here it is 0.2."),
    "batch_size_limit": ({"batch_size_limit": 21}, 1, "holds a run with batch_size_limit = 20, here it is 21."),
    "lr_batch_size": ({"lr_batch_size": 21}, 1, "holds a run with lr_batch_size = 20, here it is 21."),
    "cache_dtype": ({"cache_dtype": torch.float16}, 1, "here it is 'torch.float16'."),
    "a group of the optimizer": ({"optimizer": with_groups}, 1, 'holds a run with optimizer = "SGD ['),
    "head_filters": ({"head_filters": 16}, 1, "holds a run with head_filters = None, here it is 16."),
    "options": ({"options": {"lowering": "inductor"}}, 1, "holds a run with options = "),
    "strides": ({"model": strided()}, 1, "holds a run with layers[1] = "),
    "sizes": ({"data": larger(60), "val": larger(24)}, 1, "holds a run with image[1] = 8, here it is 16."),
    "dtype": (
        {"model": [module.double() for module in network()], "data": DOUBLE, "val": DOUBLE},
        1,
        "holds a run with dtype = 'torch.float32', here it is 'torch.float64'.",
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_a_run_with_other_settings(case, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "one"
    if not folder.exists():
        fitted(folder, epochs=1)
    changed, epochs, message = DIFFERENT[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        fitted(folder, epochs=epochs, **changed)


def test_another_network_or_other_data(tmp_path):
    fitted(tmp_path, epochs=1)
    with pytest.raises(ValueError, match=re.escape("holds a run with images[0] = 60, here it is 40.")):
        fitted(tmp_path, epochs=1, data=images(40))
    pixels, labels = images()[:]
    with pytest.raises(ValueError, match=re.escape("holds a run with labels[0][0] = 0, here it is 1.")):
        fitted(tmp_path, epochs=1, data=TensorDataset(pixels, (labels + 1) % 4))
    first, second, third, head = network()
    with pytest.raises(ValueError, match=re.escape("holds a run with units[2] = ")):
        fitted(tmp_path, epochs=1, model=[first, second, torch.nn.Sequential(third, torch.nn.Conv2d(16, 16, 1)), head])


@pytest.mark.parametrize("content", ["not JSON", "[]", '{"mine": 1}', '{"settings": 3, "plan": 4, "start": 3}'])
def test_a_manifest_of_something_else(content, tmp_path):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="Use another folder"):
        fitted(tmp_path, epochs=1)
    assert (tmp_path / "manifest.json").read_text() == content


def test_settings_of_numpy(tmp_path, monkeypatch):
    """What a checkpoint has of them is read as data."""
    optimizer = partial(torch.optim.SGD, lr=numpy.float64(0.05), momentum=0.9, weight_decay=numpy.float32(5e-4))
    stopped(tmp_path, monkeypatch, 1, 1, optimizer=optimizer)
    assert fitted(tmp_path, epochs=3, model=network(dropout=0.2), cache="always", optimizer=optimizer).exits()


def test_a_run_that_goes_on_is_compiled_as_it_was(tmp_path, monkeypatch):
    """By the same steps, since generated code may depend on the batches that it was made for."""
    seen, profiled = [], neuroflux.profiled
    monkeypatch.setattr(neuroflux, "profiled", lambda *args: seen.append(args[0].name) or profiled(*args))
    with uncompiled():
        stopped(tmp_path, monkeypatch, 1, 1)
        assert not seen
        run = flux(tmp_path, network(dropout=0.2), cache="always")
        run.fit(images(), images(24, 2), 3, progress=False)
        assert seen == ["0", "1", "2"]
        flux(tmp_path, network(dropout=0.2), cache="always").fit(images(), images(24, 2), 3, progress=False)
        assert seen == ["0", "1", "2"]
    assert [block.batch_size for block in run._report.blocks] == [9, 14, 20]


def test_exit_tolerance_may_change(tmp_path):
    fitted(tmp_path, epochs=1)
    run = fitted(tmp_path, epochs=1, exit_tolerance=0.99)
    assert run._report.chosen.unit == 0
    assert flux(tmp_path)._report is None


def test_what_was_killed_while_it_tidied_up_is_tidied(tmp_path):
    fitted(tmp_path, epochs=1)
    (tmp_path / "cache_1_train.npy").write_text("")
    fitted(tmp_path, epochs=1)
    assert not (tmp_path / "cache_1_train.npy").exists()


def test_a_run_that_goes_on_says_so(tmp_path, caplog):
    fitted(tmp_path, epochs=1)
    assert not caplog.text
    run = flux(tmp_path)
    with uncompiled():
        run.fit(images(), images(24, 2), 1, progress=False)
    assert f"going on with the run in {tmp_path}: 3 blocks are done" in caplog.text
    assert [block.batch_size for block in run.plan().blocks] == [9, 14, 20]


class Noisy(Dataset):
    def __len__(self):
        return 60

    def __getitem__(self, index):
        x, target = images()[index]
        return x + torch.randn_like(x), target


def test_accuracies_of_augmented_images(tmp_path, monkeypatch):
    """Their draws are those of the epoch, also where a run goes on."""
    whole = fitted(tmp_path / "whole", epochs=3, model=network(dropout=0.2), cache="always", val=Noisy())
    stopped(tmp_path / "run", monkeypatch, 0, 2, val=Noisy())
    run = fitted(tmp_path / "run", epochs=3, model=network(dropout=0.2), cache="always", val=Noisy())
    found, wanted = ([epoch["accuracies"] for epoch in each._report.history] for each in (run, whole))
    assert found == wanted


def test_a_damaged_cache_of_augmented_images(tmp_path, monkeypatch):
    """Its one draw is drawn again."""
    changed = {"data": Noisy(), "val": Noisy()}
    whole = fitted(tmp_path / "whole", epochs=3, model=network(dropout=0.2), cache="always", **changed)
    stopped(tmp_path / "run", monkeypatch, 2, 1, **changed)
    for split in ("train", "val"):
        flipped(tmp_path / "run" / f"cache_1_{split}.npy")
    run = fitted(tmp_path / "run", epochs=3, model=network(dropout=0.2), cache="always", **changed)
    assert all(torch.equal(value, values(whole)[name]) for name, value in values(run).items())
    assert run.exits() == whole.exits()
    assert [epoch["accuracies"] for epoch in run._report.history] == [
        epoch["accuracies"] for epoch in whole._report.history
    ]

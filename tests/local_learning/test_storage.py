"""Storage: the choice between caching and computing again, free space, speed, files."""

import os
import re
import time

import pytest
import torch
from local_learning.networks import fitted, flux, images, profiled_as, uncompiled

from convbn_compile.local_learning import _inputs
from convbn_compile.local_learning._cache import CacheWriter, cache_bytes, opened
from convbn_compile.local_learning._choice import Costs, choose
from convbn_compile.local_learning._disk import Speed, checksum, speed_of
from convbn_compile.local_learning.storage import Storage


def costs(**changed):
    """100 images of 1000 bytes, that take 0.01 s each."""
    given = {
        "images": 100,
        "epochs": 5,
        "seconds": 0.01,
        "size": 1000,
        "speed": Speed(write=1e5, read=1e6),
        "fits": True,
    }
    return Costs(**{**given, **changed})


def test_costs():
    found = costs()
    assert found.bytes == 100_000
    assert found.of_cache == pytest.approx(100 * 0.01 + 1.0 + 5 * 0.1)
    assert found.of_recomputing == pytest.approx(5.0)


CHOICES = {
    "a cache is faster": ({}, "cache", "2.50 s with a cache of 0.1 MiB, 5.00 s without"),
    "the storage is slow": ({"speed": Speed(1e5, 1e5)}, "recomputed", "7.00 s with a cache"),
    "one epoch": ({"epochs": 1}, "recomputed", "2.10 s with a cache"),
    "no memory": ({"epochs": 1, "fits": False}, "cache", "do not fit into the budget beside this one"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_choice(case):
    changed, how, why = CHOICES[case]
    found, reason = choose(costs(**changed))
    assert found == how
    assert why in reason


def test_no_space_is_an_error_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(Storage, "free", 10)
    with pytest.raises(ValueError, match=re.escape("MiB free, and caches take 0.2 MiB.")):
        fitted(tmp_path, cache="always")
    assert [file.name for file in tmp_path.glob("[!.]*")] == []


def test_two_caches_count(tmp_path, monkeypatch):
    """The next cache is written before the last is deleted."""
    first, second = (84 * 4 * 8 * side * side for side in (8, 4))
    monkeypatch.setattr(Storage, "free", first + second - 1)
    run = profiled_as(flux(tmp_path, cache="always"), 9, 14, 20)
    with uncompiled(), pytest.raises(ValueError, match="MiB free, and caches take"):
        run.fit(images(), images(24, 2), 1, progress=False)


def test_no_space_is_recomputed(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "convbn_compile.local_learning")
    monkeypatch.setattr(Storage, "free", 10)
    run = fitted(tmp_path, epochs=1)
    assert [block.source for block in run._report.blocks] == ["data", "recomputed", "recomputed"]
    assert "are free" in caplog.text


@pytest.mark.parametrize("free", [2**40, 2**20])
def test_speed(free, tmp_path, monkeypatch):
    sizes, urandom = [], os.urandom
    monkeypatch.setattr(os, "urandom", lambda size: sizes.append(size) or urandom(size))
    found = speed_of(tmp_path, free)
    assert sizes == [min(2**24, free // 2)]
    assert found.write > 0
    assert found.read > 0
    assert not list(tmp_path.iterdir())


def test_speed_of_either_way(tmp_path, monkeypatch):
    times = iter([10.0, 12.0, 13.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    assert speed_of(tmp_path, 2048) == Speed(write=512.0, read=1024.0)


def test_all_images_count(tmp_path, monkeypatch):
    """Those of both datasets are in a cache."""
    seen = []
    monkeypatch.setattr(_inputs, "choose", lambda costs: seen.append(costs.images) or choose(costs))
    fitted(tmp_path, epochs=1)
    assert seen == [84, 84]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows(dtype, tmp_path):
    storage, rows = Storage(tmp_path / "new" / "folder"), torch.randn(10, 3, 2)
    writer = CacheWriter(storage, "cache_0_train.npy", (10, 3, 2), dtype)
    writer.append(rows[:4])
    writer.append(rows[4:])
    assert not storage.path("cache_0_train.npy").exists()
    entry = writer.close()
    assert entry == {"file": "cache_0_train.npy", "sha256": checksum(storage.path("cache_0_train.npy"))}
    assert torch.equal(torch.from_numpy(opened(storage.path("cache_0_train.npy")).copy()), rows.to(dtype))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="not on this system")
def test_the_space_of_a_cache_is_taken_at_first(tmp_path):
    """A file of holes has its size and no blocks."""
    CacheWriter(Storage(tmp_path), "cache_0_train.npy", (2**10, 2**10), torch.float32)
    assert (tmp_path / "cache_0_train.npy.new").stat().st_blocks * 512 >= 2**22


def test_values_beyond_a_cache(tmp_path):
    writer = CacheWriter(Storage(tmp_path), "cache_0_train.npy", (2, 3), torch.float16)
    writer.append(torch.full((1, 3), 6e4))
    message = "cache_dtype: a cache is to hold 70000, which is beyond torch.float16. Begin again with a wider"
    with pytest.raises(ValueError, match=re.escape(message)):
        writer.append(torch.full((1, 3), 7e4))


def test_a_start_of_somebody_else(tmp_path):
    (tmp_path / "start.pt").write_text("mine")
    with pytest.raises(ValueError, match=re.escape("has start.pt, which a run would replace")):
        fitted(tmp_path, epochs=1)
    assert (tmp_path / "start.pt").read_text() == "mine"


def test_a_cache_that_is_not_full(tmp_path):
    writer = CacheWriter(Storage(tmp_path), "cache_0_train.npy", (10, 3), torch.float32)
    writer.append(torch.randn(9, 3))
    with pytest.raises(AssertionError, match="9 of 10 rows of a cache were written"):
        writer.close()


def test_the_manifest_is_there_whatever_happens(tmp_path, monkeypatch):
    storage = Storage(tmp_path)
    storage.commit({"block": 0}, [])

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("convbn_compile.local_learning.storage.replace_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage.commit({"block": 1}, [])
    assert storage.manifest() == {"block": 0}


NOT_OURS = ["checkpoint_best.pt", "labels_train.npy", "cache_features.npy", "block_diagram.pt", "start.txt"]


def test_files_of_others_are_kept(tmp_path):
    for name in NOT_OURS:
        (tmp_path / name).write_text("mine")
    fitted(tmp_path, cache="always", epochs=1)
    assert all((tmp_path / name).read_text() == "mine" for name in NOT_OURS)


@pytest.mark.parametrize("name", ["block_0.pt", "checkpoint_1_2.pt", "cache_0_train.npy", "labels_0_val.pt"])
def test_a_folder_with_files_of_a_run_and_no_manifest(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=re.escape(f"has {name}, which a run would replace, and no manifest.json")):
        fitted(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_one_run_at_a_time(tmp_path):
    with Storage(tmp_path).locked(), pytest.raises(ValueError, match="another run uses .* now"):
        fitted(tmp_path)
    assert fitted(tmp_path, epochs=1).exits()


def test_storage_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be a folder"):
        fitted(tmp_path / "file")


def test_a_cache_of_half_precision_takes_half():
    assert [cache_bytes(10, (3, 2), dtype) for dtype in (torch.float32, torch.float16)] == [240, 120]


def test_a_full_disk(tmp_path, monkeypatch):
    """What is done is kept, and nothing half written."""
    from convbn_compile.local_learning import storage

    save, saves = torch.save, []

    def full(value, file):
        saves.append(file)
        if len(saves) == 3:
            file.write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
        save(value, file)

    with monkeypatch.context() as patch:
        patch.setattr(storage.torch, "save", full)
        with pytest.raises(ValueError, match=r"storage: checkpoint_0_1.pt cannot be written to .*unexpected pos"):
            fitted(tmp_path)
    assert not list(tmp_path.glob("*.new"))
    assert len(fitted(tmp_path).exits()) == 3


def test_a_full_disk_for_a_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ValueError, match=r"cache_0_train.npy cannot be written to .*No space left on device"):
        fitted(tmp_path, cache="always")
    assert not list(tmp_path.glob("*.new"))


def test_other_errors_of_writing_stay_what_they_are(tmp_path):
    """Out of memory on a device is no full disk."""

    def write():
        with Storage(tmp_path).writing("start.pt") as new:
            new.write_bytes(b"half")
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="^out of memory$"):
        write()
    assert not list(tmp_path.iterdir())


def test_a_manifest_that_cannot_be_written(tmp_path, monkeypatch):
    from convbn_compile.local_learning import storage

    def full(new, old):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "replace_file", full)
    with pytest.raises(ValueError, match=r"manifest.json cannot be written to .*No space left on device"):
        Storage(tmp_path).commit({}, [])
    with pytest.raises(ValueError, match=r"start.pt cannot be written to .*No space left on device"):
        Storage(tmp_path).save("start.pt", [])
    assert not list(tmp_path.iterdir())


def test_files_are_read_for_their_checksum_once(tmp_path, monkeypatch):
    from convbn_compile.local_learning import storage

    reads, checksum = [], storage.checksum
    here = Storage(tmp_path)
    entry = here.save("start.pt", [torch.ones(3)])
    monkeypatch.setattr(storage, "checksum", lambda file: reads.append(file) or checksum(file))
    assert here.intact(entry)
    assert not reads
    here = Storage(tmp_path)
    assert here.intact(entry)
    assert here.intact(entry)
    assert len(reads) == 1
    content = here.path("start.pt").read_bytes()
    here.path("start.pt").write_bytes(content[::-1])
    assert not here.intact(entry)
    assert not here.intact(entry)
    here.save("start.pt", [torch.ones(3)])
    assert here.intact(entry)
    assert not here.intact({**entry, "sha256": "0"})

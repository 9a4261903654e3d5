"""The compile caches across processes: the same model hits both, another option or another source of ours misses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import convbn_compile

TESTS = Path(__file__).parent
HIT = {"autograd hits": 1, "autograd misses": 0, "autograd bypasses": 0, "graph misses": 0, "graph bypasses": 0}
MISS = {"autograd hits": 0, "autograd misses": 1, "autograd bypasses": 0, "graph hits": 0, "graph bypasses": 0}
OTHER_OPTIONS = [{"mode": "eval"}, {"memory_budget": 0.5}, {"merge_branches": False}]
ON_BATCH_STATISTICS = {"train": True}
NORM_FIRST, RELU_FIRST = {"checkpointed": "norm first"}, {"checkpointed": "relu first"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache folder, filled by one process, and what that saw."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, probe(folder, {}, ON_BATCH_STATISTICS, NORM_FIRST, RELU_FIRST)


@pytest.fixture(scope="module")
def second(cache):
    """What another process sees."""
    folder, _ = cache
    return probe(folder, {}, ON_BATCH_STATISTICS, NORM_FIRST, *OTHER_OPTIONS)


def probe(folder, *asked, package=None):
    """What a new process sees of each thing asked for; `package` is the folder to import convbn_compile from."""
    path = os.pathsep.join([str(package or Path(convbn_compile.__file__).parents[1]), str(TESTS)])
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "PYTHONPATH": path}
    environment |= {"TORCHINDUCTOR_VEC_ISA_OK": "1"}  # else a new folder has the compiler tried out for seconds
    done = subprocess.run(
        [sys.executable, TESTS / "cache_probe.py", json.dumps(asked)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    return {json.dumps(one): each for one, each in zip(asked, seen, strict=True)}


def of(seen, asked):
    return seen[json.dumps(asked)]


def counted(seen, wanted):
    return {name: seen[name] for name in wanted}


def test_the_same_model_hits_both_caches_and_is_told_the_same(cache, second):
    first, again = of(cache[1], {}), of(second, {})
    assert counted(first, MISS) == MISS
    assert counted(again, HIT) == HIT
    assert again["graph hits"] >= 1
    assert again["lines"] == first["lines"]
    assert len(first["lines"]) == 1
    assert first["lines"][0].startswith("tune: folded 1 of 2 norms; saved for backward")


@pytest.mark.parametrize("options", OTHER_OPTIONS)
def test_another_option_misses(second, options):
    assert counted(of(second, options), MISS) == MISS


def test_another_source_of_ours_misses(cache, tmp_path):
    folder, _ = cache
    shutil.copytree(Path(convbn_compile.__file__).parent, tmp_path / "convbn_compile")
    with (tmp_path / "convbn_compile" / "cost.py").open("a") as file:
        file.write("# changed\n")
    assert counted(of(probe(folder, {}, package=tmp_path), {}), MISS) == MISS


def test_a_warning_survives_the_cache(cache, second):
    first, again = of(cache[1], ON_BATCH_STATISTICS), of(second, ON_BATCH_STATISTICS)
    assert counted(again, HIT) == HIT
    assert len(first["warnings"]) == 1
    assert "folded no batch norm" in first["warnings"][0]
    assert again["warnings"] == first["warnings"]


def test_models_that_differ_inside_a_checkpoint_have_reports_of_their_own(cache, second):
    first, other, again = of(cache[1], NORM_FIRST), of(cache[1], RELU_FIRST), of(second, NORM_FIRST)
    assert "folded 1 of 1" in first["lines"][0]
    assert "folded 0 of 1" in other["lines"][0]
    assert again["lines"] == first["lines"]
    assert not again["warnings"]

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


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache folder, filled by one process with the default options."""
    folder = tmp_path_factory.mktemp("cache")
    first = probe(folder)
    assert counted(first, MISS) == MISS
    return folder, first


def probe(folder, package=None, **options):
    """What a new process sees; `package` is the folder to import convbn_compile from."""
    path = os.pathsep.join([str(package or Path(convbn_compile.__file__).parents[1]), str(TESTS)])
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, TESTS / "cache_probe.py", json.dumps(options)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def counted(seen, wanted):
    return {name: seen[name] for name in wanted}


def test_the_same_model_hits_both_caches_and_is_told_the_same(cache):
    folder, first = cache
    second = probe(folder)
    assert counted(second, HIT) == HIT
    assert second["graph hits"] >= 1
    assert second["lines"] == first["lines"]
    assert len(first["lines"]) == 1
    assert first["lines"][0].startswith("tune: folded 1 of 2 norms; saved for backward")


@pytest.mark.parametrize("options", [{"mode": "eval"}, {"memory_budget": 0.5}, {"merge_branches": False}])
def test_another_option_misses(cache, options):
    folder, _ = cache
    assert counted(probe(folder, **options), MISS) == MISS


def test_another_source_of_ours_misses(cache, tmp_path):
    folder, _ = cache
    shutil.copytree(Path(convbn_compile.__file__).parent, tmp_path / "convbn_compile")
    with (tmp_path / "convbn_compile" / "cost.py").open("a") as file:
        file.write("# changed\n")
    assert counted(probe(folder, package=tmp_path), MISS) == MISS


def test_a_warning_survives_the_cache(cache):
    folder, _ = cache
    first, second = probe(folder, train=True), probe(folder, train=True)
    assert counted(second, HIT) == HIT
    assert len(first["warnings"]) == 1
    assert "folded no batch norm" in first["warnings"][0]
    assert second["warnings"] == first["warnings"]


def test_models_that_differ_inside_a_checkpoint_have_reports_of_their_own(tmp_path):
    orders = ("norm first", "relu first", "norm first")
    first, second, third = (probe(tmp_path, checkpointed=order) for order in orders)
    assert "folded 1 of 1" in first["lines"][0]
    assert "folded 0 of 1" in second["lines"][0]
    assert third["lines"] == first["lines"]
    assert not third["warnings"]

"""The benchmark pages and README show what their JSON holds: make benchmarks would change nothing."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from test_bench import rows

from convbn_compile.benchmark import Benchmark, Row

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"
SPEC = importlib.util.spec_from_file_location("make_pages", FOLDER / "make_pages.py")
make_pages = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_pages)
FILES = sorted(FOLDER.glob("*.json"))


@pytest.mark.parametrize("page", make_pages.PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_pages_are_made_of_the_json(page):
    assert make_pages.filled(page.read_text()) == page.read_text(), "run: make benchmarks"


def test_the_page_and_readme_have_tables():
    for page in (FOLDER / "index.md", FOLDER / "saved_bytes.md", FOLDER.parents[1] / "README.md"):
        assert make_pages.PLACE.search(page.read_text()), page.name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_file_is_named_by_the_rule_shown_and_says_how_it_was_made(file):
    assert re.fullmatch(r"[a-z0-9_]+_(cpu|[ahb]\d+|gpu)_\d{6}(_\w+)?\.json", file.name)
    data = json.loads(file.read_text())
    assert {"date", "torch", "platform"} <= set(data["configuration"])
    assert any(file.name in page.read_text() for page in FOLDER.parent.rglob("*.md"))
    if "rows" in data:
        assert data["configuration"]["command"].endswith(f"--out docs/benchmarks/{file.name}")
        assert file.with_suffix(".png").exists()


def test_what_stands_between_the_marks_is_written_anew(monkeypatch, tmp_path):
    monkeypatch.setattr(make_pages, "FOLDER", tmp_path)
    where = {"model": "torchvision:resnet18", "command": "convbn-compile bench", "device": "CPU", "threads": 1}
    where |= {
        "torch": "2",
        "python": "3",
        "date": "today",
        "lowering": "aot_eager",
        "reference": "inductor",
        "steps": 1,
    }
    dead = Row("pytorch", "PyTorch's pass", 1, 8, "float32", "no such luck")
    found = Benchmark(where, (*rows((1,), (8,)), dead))
    (tmp_path / "a_cpu_202611.json").write_text(json.dumps(found.to_dict()))
    lines = make_pages.filled("<!-- compared: a_cpu_202611.json -->\nold\n<!-- end -->\nprose").splitlines()
    assert lines[0] == "<!-- compared: a_cpu_202611.json -->"
    assert (
        lines[3] == "| ResNet-18 | 1\N{MULTIPLICATION SIGN}8, float32 | 32.00 (1.00) | 16.00 (1.00) | 8.00 (1.00) | - |"
    )
    assert lines[4:] == ["<!-- end -->", "prose"]
    text = make_pages.filled("<!-- everything: a_cpu_202611.json -->\n<!-- end -->")
    assert "PyTorch's pass could not run: no such luck." in text
    assert "without code generation" in text
    assert "| TUNE | 1 | 8 | float32 | 1.0 | 1.000 | 16.00 | 3.0 |" in text
    assert "(a_cpu_202611.png)" in text

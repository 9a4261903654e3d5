"""The table of the paper's Appendix E: what is committed is what the script finds, and the page shows it."""

import json
from pathlib import Path

import paper_table_e
import pytest
import torch
from saved_bytes import MIB, make
from support import randomise
from torch import nn

PAGE = Path(__file__).parents[1] / "docs/benchmarks/paper_table_e.md"


@pytest.fixture(scope="module")
def rows():
    return json.loads(PAGE.with_name("paper_table_e_cpu_202611.json").read_text())["settings"]


def test_settings_that_are_not_traced_are_as_if_they_were():
    net = randomise(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())).to("meta")
    settings = [(2, 32), (4, 32), (6, 32), (8, 32), (4, 64), (4, 96)]
    found = paper_table_e.count_all(net, "tune", settings, "net")
    assert list(found) == settings
    assert found[4, 64] == paper_table_e.named(paper_table_e.count(net, "tune", (4, 64)))


def test_the_page_shows_what_is_committed(rows):
    page = PAGE.read_text()
    assert paper_table_e.table(rows) in page
    assert paper_table_e.per_image(rows) in page


def test_the_table_has_all_settings_and_figures_of_the_paper(rows):
    assert {(row["batch"], row["size"]) for row in rows} == set(paper_table_e.PAPER)
    assert all(tuple(row["paper"].values()) == paper_table_e.PAPER[row["batch"], row["size"]] for row in rows)


@pytest.mark.parametrize("name", ["Eval", "fused network"])
def test_a_row_counted_again(name, rows):
    """What eager keeps of 32 images of 224; with the compiled graphs this takes too long."""
    with torch.device("meta"):
        net, x = paper_table_e.CONTENDERS[name][1](make("resnet50")), torch.empty(32, 3, 224, 224)
    row = next(row for row in rows if (row["batch"], row["size"]) == (32, 224))
    assert row[name]["eager saved"] == paper_table_e.eager_saved_bytes(net, x)


def test_the_same_bytes_per_image_as_are_measured(rows):
    """4 images of 224 keep 140.14 MiB of the fused network (docs/benchmarks/saved_bytes.md), and Tune no more."""
    for row in rows:
        images = row["batch"] * (row["size"] / 224) ** 2
        assert row["fused network"]["saved"] / MIB == pytest.approx(140.14 / 4 * images, rel=1e-3)
        assert row["Tune"]["saved"] <= row["fused network"]["saved"] < row["Eval"]["saved"]

"""The Python in README and docs runs as printed, and links lead somewhere."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "convbn_compile").rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_runs(page, capsys):
    """All blocks of a page in order, in one namespace."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    namespace = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)
    if page.name == "README.md":
        assert "folded 2 of 2 norms" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def strings(node):
    """All that a module says, "..." in place of what is formatted in."""
    for part in ast.walk(node):
        if isinstance(part, ast.JoinedStr):
            yield "".join(item.value if isinstance(item, ast.Constant) else "..." for item in part.values)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def test_reasons_that_are_explained_are_given():
    """The first column of the table of reasons: N and ... stand for anything, "the convolution" for any operator."""
    table = (
        (ROOT / "docs/troubleshooting.md").read_text().partition("| the reason in the report |")[2].partition("\n\n")[0]
    )
    reasons = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    said = [text for file in PACKAGE for text in strings(ast.parse(file.read_text()))]
    assert len(reasons) > 5
    for reason in reasons:
        pattern = ".+".join(re.escape(part.strip()) for part in re.split(r"\.\.\.|\bN\b|(?<=the )convolution", reason))
        assert any(re.search(pattern, text) for text in said), reason

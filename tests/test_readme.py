"""The code in the README and the documentation runs as printed, what they point to is there, and the site builds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python(.*)\n(?s:(.*?))^```", re.MULTILINE)
LINK = re.compile(r"\]\((?!http|#)([^)#]+)")


def pages(pattern: re.Pattern[str]):
    """Those pages in which it is found."""
    found = [page for page in PAGES if pattern.search(page.read_text(encoding="utf-8"))]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in found]


@pytest.mark.parametrize("page", pages(BLOCK))
def test_python_blocks(page):
    """One after the other, in one namespace, but for those whose title says what they need."""
    namespace = {"__name__": page.stem}
    for info, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if info:
            assert re.fullmatch(r' title="needs .+"', info), f"```python{info}: say what it needs, or nothing"
        else:
            exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", pages(LINK))
def test_links(page):
    links = set(LINK.findall(page.read_text(encoding="utf-8")))
    assert not [link for link in sorted(links) if not (page.parent / link).exists()]


def test_site(tmp_path):
    """mkdocs finds no fault with it, and its pages load nothing from another host."""
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    built = [page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")]
    assert len(built) >= len(PAGES) - len(list(ROOT.glob("*.md")))
    assert not [page for page in built if re.search(r"(src|<link[^>]* href)=.?https?://", page)]


def test_tables_are_the_files():
    """A table of results in the README, and that of its tuning in the experiments, is what the results file gives."""
    import json
    import sys

    sys.path.insert(0, str(ROOT / "bench"))
    import digits
    import paper_lm
    import runs

    results = ROOT / "bench" / "results"
    records = runs.load(results / "paper_lm_default.json")["runs"]
    assert not [record for record in records if record["commit"].endswith("-dirty")]
    rows = json.loads((results / "digits.json").read_text())["rows"]
    for table in (paper_lm.table(paper_lm.finished(records)), digits.table(rows)):
        assert table in README
    experiments = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    assert paper_lm.tuning_table(records) in experiments

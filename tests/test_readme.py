"""The code in the README and the documentation runs as printed, what they point to is there, and the site builds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pc_triton

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
    """Sphinx finds no fault with it; it says its version, and its pages load nothing from another host."""
    for needed in ("sphinx", "myst_nb", "furo"):
        pytest.importorskip(needed)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", ROOT / "docs", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = {page.relative_to(tmp_path): page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")}
    sources = [page for kind in ("*.md", "*.ipynb") for page in (ROOT / "docs").rglob(kind)]
    assert {page.relative_to(ROOT / "docs").with_suffix(".html") for page in sources} <= built.keys()
    assert f"pc_triton {pc_triton.__version__}" in built[Path("index.html")]
    assert "toctree" not in README + (ROOT / "docs" / "index.md").read_text(encoding="utf-8")  # they are read on GitHub
    foreign = re.compile(r"<(script|img|iframe|source|link)[^>]* (src|href)=.?(https?:)?//")
    assert not [page for page, text in built.items() if foreign.search(text)]
    assert not [page for page, text in built.items() if re.search(r"<dt[^>]*>Type<", text)]  # that is prose


def test_tables_are_the_files():
    """A table of results in the README, and that of its tuning in the experiments, is what the results file gives."""
    import json

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


def test_rows_have_the_numbers_of_their_page():
    """What a row of results says of the benchmark or of a bet stands on its page; tests hold that page to the files."""
    rows = [line for line in README.splitlines() if re.match(r"\| \[.*\]\(docs/(benchmark|bets)\.md", line)]
    assert len(rows) == 6
    for row in rows:
        page = (ROOT / re.search(r"\((docs/\w+\.md)", row)[1]).read_text(encoding="utf-8")
        _, _, equal_steps, _, equal_products, _ = row.split("|")
        numbers = re.findall(r"-?\d+\.\d+", equal_steps + equal_products)
        assert not [number for number in numbers if not re.search(rf"(?<![\d.]){number}(?!\d)", page)]

"""The README's code runs as printed, and what it points to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert "settled" in capsys.readouterr().out


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http|#)([^)]+)\)", README))))
def test_links(target):
    assert (ROOT / target).exists()


def test_tables_are_the_files():
    """A table of results in the README is what its results file gives."""
    import json
    import sys

    sys.path.insert(0, str(ROOT / "bench"))
    import compare_methods
    import digits

    runs = json.loads((ROOT / "bench/results/methods.json").read_text())["runs"]
    final = compare_methods.chosen(runs, compare_methods.best_rates(runs))
    rows = json.loads((ROOT / "bench/results/digits.json").read_text())["rows"]
    tuning = compare_methods.tuning_table(runs, compare_methods.LEARNING_RATES)
    for table in (compare_methods.table(final), tuning, digits.table(rows)):
        assert table in README

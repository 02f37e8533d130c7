"""The package as docs/core.md has it: imports point one way, files are short, the code shown is the code."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from pc_triton import orders

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "pc_triton").glob("*.py"))
LINE = ["free_energy", "orders", "batch", "node", "distributions", "context"]


def imported(code: str, modules: set[str]) -> Iterator[str]:
    """The modules of the package that a file imports, anywhere: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            name = (node.module or "").removeprefix("pc_triton").lstrip(".").split(".")[0]
            if node.level == 1 or (node.module or "").split(".")[0] == "pc_triton":
                yield from [name] if name else [alias.name for alias in node.names if alias.name in modules]
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            yield from [part[1] for part in parts if part[0] == "pc_triton" and len(part) > 1]


def arrows() -> dict[str, set[str]]:
    """What each module imports."""
    modules = {path.stem for path in FILES} - {"__init__"}
    found = {path.stem: set(imported(path.read_text(encoding="utf-8"), modules)) for path in FILES}
    return {name: to & modules for name, to in found.items() if name != "__init__"}


def test_no_import_circle():
    found = arrows()
    try:
        placed = list(TopologicalSorter(found).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))
    assert set(LINE) <= set(placed)
    assert {"orders", "rules"} <= found["free_energy"]
    assert "context" in found["distributions"]
    later = {name: placed.index(name) for name in LINE}
    assert later == dict(sorted(later.items(), key=lambda item: -item[1]))


def test_imports_are_found_wherever_they_are():
    hidden = "def f():\n    from .a import x\nif TYPE_CHECKING:\n    from . import b, y\n"
    code = hidden + "import pc_triton.c\nfrom pc_triton.d import z"
    assert sorted(imported(code, {"a", "b", "c", "d"})) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_file_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_the_code_shown_is_the_code():
    """The page's blocks are the functions of the default order, as they run."""
    page = (ROOT / "docs" / "core.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python[^\n]*orders\.py\"\n(?s:(.*?))^```", page, re.MULTILINE)
    assert blocks == [inspect.getsource(f) for f in (orders.error, orders.begin_errors, orders.descend)]


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = [ROOT / name for name in ("", "pc_triton", "kernels", "tests", "bench")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_in_the_documentation_exist(page):
    """Every `file.py`, with or without its folder; NAME in a recipe stands for the reader's own."""
    named = set(re.findall(r"(?<![\w./])([\w./]+\.py)\b", page.read_text(encoding="utf-8")))
    assert not [file for file in sorted(named) if "NAME" not in file and not is_there(page, file)]


def is_there(page: Path, file: str) -> bool:
    return any((folder / file).is_file() for folder in (page.parent, *FOLDERS))


def test_a_file_that_is_not_there_is_seen():
    assert is_there(ROOT / "README.md", "orders.py")
    assert is_there(ROOT / "docs" / "kernel.md", "../kernels/gaussian.py")
    assert not is_there(ROOT / "README.md", "inference.py")


PROGRAMS = (ROOT / "docs" / "programs.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (.+?) \| .*`(test_\w+\.py)::(test_\w+)` \|$", PROGRAMS, re.MULTILINE)
QUOTED = [message for start, *_ in ROWS for message in re.findall(r"^(?:Warning: )?`([^`]+)`$", start)]


def texts(code: str) -> Iterator[str]:
    """The strings of a file, with … for what is put into them."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_programs_names_tests_that_exist():
    rows = [
        row for row in PROGRAMS.splitlines() if row.startswith("|") and not re.match(r"\|(---| .*the test.* \|$)", row)
    ]
    assert len(ROWS) == len(rows), "each row of a table ends in its test"
    for _, file, test in ROWS:
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_programs_quotes_what_the_package_says():
    """The start of each message, as it is in the package."""
    said = [text for path in FILES for text in texts(path.read_text(encoding="utf-8"))]
    assert len(QUOTED) > 40
    assert not [message for message in QUOTED if not any(text.startswith(message) for text in said)]

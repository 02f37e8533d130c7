"""The package as docs/core.md has it: imports point one way, files are short, the code shown is the code."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from torch import nn

import pc_triton as pc
from pc_triton import orders
from pc_triton.errors import PAGE

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


ERRORS = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
LISTS = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("programs", "errors")}
ROW = re.compile(r"^\| (.+?) \| .*`(test_\w+\.py)::(test_\w+)` \|$", re.MULTILINE)
QUOTED = [row for start, *_ in ROW.findall(ERRORS) for row in re.findall(r"^`([^`]+)`$", start)]
SECTIONS = dict(re.findall(r"^### (.+)\n\n((?s:.*?))(?=^##|\Z)", ERRORS, re.MULTILINE))
"""The messages that have a heading, with the text under it."""


def texts(code: str) -> Iterator[str]:
    """The strings of a file, with … for what is put into them."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def messages(section: str) -> list[str]:
    """The messages that a section quotes."""
    return re.findall(r"^> (?:Warning: )?`([^`]+)`$", section, re.MULTILINE)


def anchor(heading: str) -> str:
    """What a heading's link ends in, on GitHub as on the site."""
    return re.sub(r"[^\w\s-]", "", heading).lower().replace(" ", "-")


def links() -> list[tuple[str, str]]:
    """Each message of the package that ends in a link to the page: the message, and the link."""
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "see":
                assert isinstance(node.args[0], ast.Constant)
                found.append((path.name, str(node.args[0].value)))
    return found


@pytest.mark.parametrize("name", LISTS)
def test_pages_name_tests_that_exist(name):
    page = LISTS[name]
    rows = [row for row in page.splitlines() if row.startswith("|") and not re.match(r"\|(---| .*the test.* \|$)", row)]
    assert len(ROW.findall(page)) == len(rows) > 10, "each row of a table ends in its test"
    for _, file, test in ROW.findall(page) + re.findall(r"^(Test): `(\w+\.py)::(\w+)`$", page, re.MULTILINE):
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_the_page_of_errors_quotes_what_the_package_says():
    """The start of each message, as it is in the package; and each section has a message and its test."""
    said = [text for path in FILES for text in texts(path.read_text(encoding="utf-8"))]
    quoted = [*QUOTED, *(message for section in SECTIONS.values() for message in messages(section))]
    assert len(quoted) > 40
    assert not [message for message in quoted if not any(text.startswith(message) for text in said)]
    for heading, section in SECTIONS.items():
        assert len(messages(section)) >= 1, heading
        assert "\nTest: `test_" in section, heading


def test_messages_link_to_the_page_of_errors():
    """Every link points to a heading, and every heading is linked to by the message under it."""
    assert PAGE == "docs/errors.md"
    anchors = {anchor(heading): heading for heading in SECTIONS}
    assert len(anchors) == len(SECTIONS) > 20
    linked = [link for _, link in links()]
    assert set(linked) == set(anchors)
    for name, heading in anchors.items():
        assert linked.count(name) == len(messages(SECTIONS[heading])), heading


def test_a_message_ends_in_its_place():
    with pytest.raises(ValueError, match=r"pc\.convert\(model\) \(docs/errors\.md#no-value-node\)$"):
        pc.FreeEnergy(nn.Linear(2, 2))

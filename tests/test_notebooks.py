"""The notebooks of docs/notebooks run from top to bottom in a fresh kernel, and give the outputs that are stored.

``python tests/test_notebooks.py [NAME ...]`` runs them and stores their outputs anew.
"""

from __future__ import annotations

import math
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "docs" / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
LINK = re.compile(r"\]\((?!http|#)([^)#]+)")


def read(name: str) -> Any:
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def execute(name: str) -> Any:
    """The notebook with new outputs. One thread, as the tests have; the kernel is reached without a network port."""
    nbclient = pytest.importorskip("nbclient")
    from jupyter_client.manager import AsyncKernelManager

    pytest.importorskip("ipykernel")
    notebook = read(name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(NOTEBOOKS.parents[1])}
    environment.pop("TRITON_INTERPRET", None)  # a notebook that needs the interpreter says so itself
    environment.pop("MPLBACKEND", None)
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        startup_timeout=300,
        kernel_manager_class=AsyncKernelManager,
        resources={"metadata": {"path": str(NOTEBOOKS)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.km = client.create_kernel_manager()
    with tempfile.TemporaryDirectory() as sockets:  # files, so that no two tests can take the same port
        client.km.transport, client.km.ip = "ipc", f"{sockets}/kernel"
        client.execute(env=environment)
    return notebook


def text(output: Any) -> str:
    """What an output says in words; of a figure or a table only that there is one."""
    if output.output_type == "stream":
        return output.text
    shown = {"image/png": "a figure", "text/html": "a table"}
    return next((word for kind, word in shown.items() if kind in output.data), output.data["text/plain"])


def close(stored: str, found: str) -> bool:
    """Within 5 %, or by one in the last decimal: other processors add in another order."""
    _, _, decimals = stored.partition(".")
    last = 10.0 ** -len(decimals) if decimals.isdigit() else 0.0
    return math.isclose(float(stored), float(found), rel_tol=0.05, abs_tol=1.01 * last)


def same(stored: str, found: str) -> bool:
    """The same words, and numbers that are close."""
    words = NUMBER.sub("#", stored) == NUMBER.sub("#", found)
    return words and all(map(close, NUMBER.findall(stored), NUMBER.findall(found)))


@pytest.mark.parametrize("name", NAMES)
def test_runs_and_gives_what_is_stored(name):
    stored, found = read(name), execute(name)
    for before, after in zip(stored.cells, found.cells):
        if before.cell_type == "code":
            assert before.execution_count == after.execution_count, f"cell {before.id}: store the outputs anew"
            was, now = ("".join(map(text, cell.outputs)) for cell in (before, after))
            if "varies" in before.metadata.get("tags", ()):  # with the last bits of a long training
                was, now = ("something" if words else "nothing" for words in (was, now))
            assert same(was, now), f"cell {before.id} gives\n{now}\nand not\n{was}"


@pytest.mark.parametrize("name", NAMES)
def test_is_small_and_its_links_are_there(name):
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 300_000
    words = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    assert not [link for link in LINK.findall(words) if not (NOTEBOOKS / link).exists()]


def test_all_are_listed():
    page = (NOTEBOOKS / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\(([^)]+)\.ipynb\)", page)) == set(NAMES)


@pytest.mark.parametrize(
    ("found", "equal"),
    [("loss 1.00, T 20", True), ("loss 1.04, T 20", True), ("loss 1.1, T 20", False), ("F 1.00, T 20", False)],
)
def test_a_difference_is_seen(found, equal):
    assert same("loss 1.00, T 20", found) == equal


if __name__ == "__main__":
    import nbformat

    for name in sys.argv[1:] or NAMES:
        nbformat.write(execute(name), NOTEBOOKS / f"{name}.ipynb")
        print(f"{name}: {(NOTEBOOKS / f'{name}.ipynb').stat().st_size / 1000:.0f} kB")

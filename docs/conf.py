"""The site of the documentation: ``python -m sphinx -W docs build/site``. Its pages are plain Markdown."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the docstrings of this checkout, whatever is installed

import pc_triton  # noqa: E402

PAGES = {  # the sidebar: caption, then the pages below it
    "Guides": """quick_start in_your_program command_line order_and_steps report beyond_defaults methods core layout
        distribution kernel programs errors coming_from large_runs experiments benchmark bets versions changes""",
    "Notebooks": "notebooks/index notebooks/pc_in_ten_minutes notebooks/*",
    "API": "api/free_energy api/layers api/distributions api/reference",
}

project = "pc_triton"
author = "The pc_triton authors"
copyright = f"2026 {author}"
release = version = pc_triton.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["examples"]
root_doc = "index"
smartquotes = False  # "auto" is an argument

html_theme = "furo"
html_title = f"pc_triton {release}"
html_copy_source = html_show_sourcelink = False

myst_heading_anchors = 4
nb_execution_mode = "off"  # the outputs in the notebooks are shown as they are

default_role = "py:obj"  # `Name` in a docstring is a link
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False


def on_source_read(app, page: str, source: list[str]) -> None:
    """Add what GitHub would print as it stands: captions of code, the changes, and on the first page the sidebar."""
    if page == "changes":
        source[0] = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
    source[0] = re.sub(r'^```(\w+) title="(.+)"$', r"```{code-block} \1\n:caption: \2\n", source[0], flags=re.MULTILINE)
    if page == root_doc:
        for caption, pages in PAGES.items():
            there = [entry for entry in pages.split() if any((ROOT / "docs").glob(f"{entry}.*"))]
            if there:
                body = "\n".join([f":caption: {caption}", ":hidden:", ":glob:", "", *there])
                source[0] += f"\n```{{toctree}}\n{body}\n```\n"


def on_docstring(app, what: str, name: str, obj, options, lines: list[str]) -> None:
    """Keep the first line of an attribute's docstring as prose: napoleon takes what is before a colon for a type."""
    if what in ("attribute", "property"):
        lines[:0] = ["..", ""]  # an empty comment


def setup(app) -> None:
    app.connect("source-read", on_source_read)
    app.connect("autodoc-process-docstring", on_docstring, priority=400)  # before napoleon's

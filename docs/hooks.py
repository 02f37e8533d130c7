"""mkdocs hook: a page's links to files outside docs/, as in ``../bench/results``, hold on the site too."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Copy each file outside docs/ that the page links to into the site, and link to it there."""

    def copied(link: re.Match[str]) -> str:
        path = link[1]
        if files.get_file_from_path(path) is None:
            source = Path(config.config_file_path).parent / path
            files.append(File.generated(config, path, abs_src_path=str(source)))
        return f"]({path})"

    return re.sub(r"\]\(\.\./([^)#]+)\)", copied, markdown)

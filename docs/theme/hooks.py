"""What mkdocs is told beside mkdocs.yml: two pages that lie outside docs/, and the links to what lies there."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {"benchmarks/README.md": "benchmark_notes.md", "CHANGELOG.md": "changelog.md"}
"""Pages of the repository, by where they are on the site."""
REPOSITORY = "https://github.com/gptoss-opt/gptoss_opt/blob/main"
"""Where files are that are no pages."""
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between files of the repository, as links between pages of the site."""
    on_site = page.file.src_uri
    sources = {name: source for source, name in PAGES.items()}
    return links(markdown, source=sources.get(on_site, f"docs/{on_site}"), on_site=on_site)


def links(markdown: str, *, source: str, on_site: str) -> str:
    """The same text, whose links are those of a page of the site.

    Args:
        markdown: the text of a page.
        source: where its file is in the repository.
        on_site: where its page is on the site.
    """

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        page = PAGES.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        if page is not None:
            return f"]({posixpath.relpath(page, posixpath.dirname(on_site) or '.')}"
        return f"]({REPOSITORY}/{target}" if (ROOT / target).is_file() else match[0]

    return LINK.sub(moved, markdown)

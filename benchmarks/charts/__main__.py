"""Draw all charts, and write their page."""

from __future__ import annotations

from pathlib import Path

from .draw import drawn
from .page import measured, page, picture, title

DOCS = Path(__file__).parents[2] / "docs"


def main() -> None:
    """Write docs/benchmarks.md, and the pictures in it."""
    folder = DOCS / "images" / "charts"
    folder.mkdir(parents=True, exist_ok=True)
    for chart, kind, lines in measured():
        (folder / picture(chart, kind)).write_text(drawn(chart, chart.rows(lines), title(chart, kind)))
    (DOCS / "benchmarks.md").write_text(page())


if __name__ == "__main__":
    main()

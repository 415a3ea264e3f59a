"""Draw all charts, and write their page and the table of the README."""

from __future__ import annotations

import re
from pathlib import Path

from .draw import drawn
from .page import measured, page, picture, title
from .readme import table

ROOT = Path(__file__).parents[2]
TABLE = re.compile(r"^\| \| AMD EPYC.*?\n(?=\n)", re.MULTILINE | re.DOTALL)


def main() -> None:
    """Write docs/benchmarks.md, the pictures in it, and the README's table."""
    folder = ROOT / "docs" / "images" / "charts"
    folder.mkdir(parents=True, exist_ok=True)
    for chart, kind, lines in measured():
        (folder / picture(chart, kind)).write_text(drawn(chart, chart.rows(lines), title(chart, kind)))
    (ROOT / "docs" / "benchmarks.md").write_text(page())
    readme = ROOT / "README.md"
    readme.write_text(TABLE.sub(lambda _: table(), readme.read_text(), count=1))


if __name__ == "__main__":
    main()

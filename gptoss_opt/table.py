"""`Table`: columns and rows of text, as lines in a terminal and as HTML in a notebook."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

Cell = str | tuple[str, ...]
"""A cell is one paragraph, or a tuple of paragraphs that start on lines of their own."""

SHORT = 24
"""Paragraphs of up to so many characters are never broken in HTML, however narrow the page is."""


@dataclass(frozen=True, repr=False)
class Table:
    """A table of text: `str` gives aligned lines, and a notebook shows HTML.

    HTML sets no colours, so that it is read in light and dark themes alike.

    Attributes:
        columns: the headings.
        rows: the cells of each row, one for each column.
        widths: the width of each column in characters; paragraphs are wrapped to it, and rules part the rows. None
            makes each column as wide as its longest paragraph, with one rule below the headings.

    Example:
        >>> print(Table(("stack", "speed"), [("eager", "7 tokens/s"), ("flash", "9 tokens/s")]))
        stack  speed
        -----  ----------
        eager  7 tokens/s
        flash  9 tokens/s
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    widths: Sequence[int] | None = None

    def __str__(self) -> str:
        rows = [[_paragraphs(cell) for cell in row] for row in (self.columns, *self.rows)]
        if self.widths:
            rows = [[_wrap(cell, width) for cell, width in zip(row, self.widths, strict=True)] for row in rows]
        widths = self.widths or [max(map(len, chain(*column))) for column in zip(*rows, strict=True)]
        margin, bar, cross = (" ", "|", "+") if self.widths else ("", "  ", "  ")

        def text(row: list[tuple[str, ...]]) -> str:
            lines = (zip(line, widths, strict=True) for line in zip_longest(*row, fillvalue=""))
            return "\n".join(bar.join(f"{margin}{part:<{n}}{margin}" for part, n in line).rstrip() for line in lines)

        head, *body = map(text, rows)
        rule = cross.join("-" * (width + 2 * len(margin)) for width in widths)
        parts = [rule, *chain(*((row, rule) for row in (head, *body)))] if self.widths else [head, rule, *body]
        return "\n".join(parts)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th style='text-align:left'>{html.escape(heading)}</th>" for heading in self.columns)
        body = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in self.rows)
        # The margin parts tables that follow each other, where the page has none.
        return (
            f"<div style='margin-bottom:1em'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )


def _paragraphs(cell: Cell) -> tuple[str, ...]:
    return (cell,) if isinstance(cell, str) else cell


def _wrap(paragraphs: tuple[str, ...], width: int) -> tuple[str, ...]:
    return tuple(line for paragraph in paragraphs for line in textwrap.wrap(paragraph, width) or [""])


def _html_cell(cell: Cell) -> str:
    paragraphs = _paragraphs(cell)
    space = "pre" if max(map(len, paragraphs), default=0) <= SHORT else "pre-wrap"
    parts = [html.escape(paragraph) for paragraph in paragraphs]
    if len(paragraphs) > 1:
        # Lines after the first are indented, so that each paragraph is seen to begin.
        parts = [f"<div style='padding-left:1em;text-indent:-1em'>{part}</div>" for part in parts]
    return f"<td style='text-align:left;vertical-align:top;white-space:{space}'>{''.join(parts)}</td>"

"""`explain(model)`: what is on a model, as a table in a terminal and as HTML in a notebook."""

from __future__ import annotations

import html
import textwrap
from dataclasses import dataclass

from torch import nn

from .record import Applied, record_of, standing, wrapped_model

HEADINGS = ("wrapper", "what it changed", "backend", "why not the others")
WIDTHS = (34, 44, 10, 44)


@dataclass(frozen=True)
class Row:
    """One wrapper: its call, its changes, its backend ("" if it has none), and (backend, reason) for the others."""

    wrapper: str
    changed: tuple[str, ...]
    backend: str
    rejected: tuple[tuple[str, str], ...]

    def cells(self) -> tuple[tuple[str, ...], ...]:
        """The four cells of the table, each a tuple of paragraphs."""
        return (self.wrapper,), self.changed, (self.backend,), tuple(f"{name}: {why}" for name, why in self.rejected)


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns: prints as a table, shows as HTML in a notebook, and holds the facts in `rows`."""

    title: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        if not self.rows:
            return self.title
        lines = [self.title, *_table([tuple((heading,) for heading in HEADINGS), *(row.cells() for row in self.rows)])]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th style='text-align:left'>{heading}</th>" for heading in HEADINGS)
        body = "".join(f"<tr>{''.join(map(_html_cell, row.cells()))}</tr>" for row in self.rows)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if self.rows else ""
        return f"<p>{html.escape(self.title)}</p>{table}"


def _html_cell(paragraphs: tuple[str, ...]) -> str:
    return f"<td style='text-align:left;vertical-align:top'>{'<br>'.join(map(html.escape, paragraphs))}</td>"


def _table(rows: list[tuple[tuple[str, ...], ...]]) -> list[str]:
    """Rows of cells of paragraphs as lines of text, wrapped to the column widths, with rules between rows."""
    rule = "+".join("-" * (width + 2) for width in WIDTHS)
    lines = [rule]
    for row in rows:
        wrapped = [
            [line for paragraph in cell for line in textwrap.wrap(paragraph, width) or [""]]
            for cell, width in zip(row, WIDTHS, strict=True)
        ]
        for number in range(max(map(len, wrapped))):
            parts = (
                f" {cell[number] if number < len(cell) else '':<{width}} "
                for cell, width in zip(wrapped, WIDTHS, strict=True)
            )
            lines.append("|".join(parts).rstrip())
        lines.append(rule)
    return lines


def _row(applied: Applied, stands: bool) -> Row:
    choice = applied.report.choice
    since = () if stands else ("changed by you since: apply it again, or undo it",)
    return Row(
        repr(applied.wrapper),
        (*applied.report.changed, *since),
        choice.backend if choice else "",
        choice.rejected if choice else (),
    )


def explain(model: nn.Module) -> Explanation:
    """What the wrappers did to `model`: each wrapper, its changes, its backend, and why not the others.

    A module around a wrapped model (compiled, DDP) is looked into.

    Example:
        >>> print(explain(model))
        GptOssForCausalLM: no wrappers
        >>> explain(with_flash_attention(model)).rows[0].backend
        'torch'
    """
    inner = wrapped_model(model)
    record = record_of(inner)
    rows = tuple(map(_row, record.applied, standing(record, inner)))
    count = f"{len(rows)} wrapper{'s' * (len(rows) > 1)}" if rows else "no wrappers"
    ranks = f"; {record.mesh.describe(inner)}" if record.mesh else ""
    return Explanation(f"{type(inner).__name__}: {count}{ranks}", rows)

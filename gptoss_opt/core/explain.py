"""`explain(model)`: what is on a model, as a table in a terminal and as HTML in a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..table import Table
from .journal import Edit
from .record import fallen_edits, record_of, wrapped_model
from .spec import Attachment

HEADINGS = ("wrapper", "what it changed", "backend", "why not the others")
WIDTHS = (34, 44, 10, 44)


@dataclass(frozen=True)
class Row:
    """One wrapper: its call, its changes, its backend ("" if it has none), and (backend, reason) for the others."""

    wrapper: str
    changed: tuple[str, ...]
    backend: str
    rejected: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns: prints as a table, shows as HTML in a notebook, and holds the facts in `rows`."""

    title: str
    rows: tuple[Row, ...]

    @property
    def table(self) -> Table:
        """The rows as a table, each wrapped to `WIDTHS`."""
        others = [tuple(f"{name}: {why}" for name, why in row.rejected) for row in self.rows]
        cells = [(row.wrapper, row.changed, row.backend, why) for row, why in zip(self.rows, others, strict=True)]
        return Table(HEADINGS, cells, WIDTHS)

    def __str__(self) -> str:
        return f"{self.title}\n{self.table}" if self.rows else self.title

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.title)}</p>{self.table._repr_html_() if self.rows else ''}"


def _row(applied: Attachment, fallen: Sequence[Edit]) -> Row:
    choice = applied.report.choice
    since = () if not fallen else ("changed by you since: apply it again, or undo it",)
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
        >>> explain(with_flash_attention(model, backend="torch")).rows[0].backend
        'torch'
    """
    inner = wrapped_model(model)
    record = record_of(inner)
    rows = tuple(map(_row, record.applied, fallen_edits(record, inner)))
    count = f"{len(rows)} wrapper{'s' * (len(rows) > 1)}" if rows else "no wrappers"
    ranks = f"; {record.mesh.describe(inner)}" if record.mesh else ""
    return Explanation(f"{type(inner).__name__}: {count}{ranks}", rows)

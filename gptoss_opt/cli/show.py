"""How answers are shown: rich tables as wide as the terminal, or JSON; and the code of a call."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from ..table import Table


def mistakes() -> tuple[type[Exception], ...]:
    """What the library raises for a user's mistake."""
    from .. import BackendError, CheckpointError, CompatibilityError, PlanError

    # Sizes and descriptions that cannot be are ValueErrors: of layouts, of machines, of finetuning, of prompts.
    return BackendError, CheckpointError, CompatibilityError, PlanError, ValueError


def call(
    function: str,
    given: Sequence[Any],
    options: Mapping[str, Any],
    of: Callable[..., Any] | None = None,
    *,
    first: str = "",
) -> str:
    """A call as Python writes it, without options that are as they are by default.

    Example:
        >>> call("plan", ["20b"], {"context": 8})
        'plan("20b", context=8)'
    """
    defaults = {} if of is None else {name: one.default for name, one in inspect.signature(of).parameters.items()}
    named = [
        f"{name}={written(value)}" for name, value in options.items() if name not in defaults or defaults[name] != value
    ]
    return f"{function}({', '.join([*([first] if first else []), *map(written, given), *named])})"


def written(value: Any) -> str:
    """A value as Python writes it, texts in double quotes."""
    if isinstance(value, list):
        return f"[{', '.join(map(written, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def answer(found: Any, lines: Iterable[str], tables: Iterable[Table], more: Iterable[str], as_json: bool) -> None:
    """Print what was found: as JSON of its `to_dict`, or lines, tables and more lines."""
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        return
    console = Console(highlight=False)
    for line in lines:
        console.print(Text(line))
    for table in tables:
        console.print()
        console.print(_rich(table))
    for line in more:
        console.print()
        # Code is copied: it is not broken.
        console.print(Text(line), soft_wrap=True)


def _rich(table: Table) -> RichTable:
    made = RichTable(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for number, heading in enumerate(table.columns):
        made.add_column(heading, overflow="fold", no_wrap=number == 0 and not table.widths)
    for row in table.rows:
        made.add_row(*(Text(cell if isinstance(cell, str) else "\n".join(cell)) for cell in row))
    return made

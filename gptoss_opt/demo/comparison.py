"""The shape of the demo: a comparison measures cases in one way, each gives outcomes, and columns write them."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..table import Table


@dataclass(frozen=True)
class Case:
    """One row: its label, the wrapper (if any) on its model, and whether a `ContinuousBatcher` serves its prompts."""

    label: str
    wrap: Callable[[Any], Any] | None = None
    batcher: bool = False


@dataclass(frozen=True)
class Settings:
    """The arguments of `run_demo` for one comparison, and a folder for the outputs of its first case."""

    name: str
    path: str
    dtype: str
    new_tokens: int
    lengths: Sequence[int]
    threads: int | None
    ranks: int | None
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """What came of a case: figures by column, what is beyond the tolerance, and what `explain` says of the model."""

    figures: dict[str, Any]
    problems: tuple[str, ...] = ()
    explanation: str = ""


Step = str | Outcome | None
"""What a measurement tells: what it does now, an outcome, or (None) that another step of the progress bar is done."""


@dataclass(frozen=True)
class Column:
    """How the figure of this name is written: by `form`, or as `missing` if it is None.

    What is `beside` it is how many times "less" or "more" than the first row's it is, or its "share" of that. With
    "first" it is about the agreement with the first row, which has "-" itself.
    """

    heading: str
    form: Callable[[Any], str] = str
    beside: Literal["less", "more", "share", "first"] | None = None
    missing: str = "n/a"

    def cell(self, outcome: Outcome, first: Outcome) -> str:
        """The cell of this outcome, beside the first of those it is compared with."""
        this, that = outcome.figures[self.heading], first.figures[self.heading]
        if self.beside == "first" and outcome is first:
            return "-"
        if this is None:
            return self.missing
        text = self.form(this)
        if self.beside == "share":
            return f"{text} ({this / that:.0%})"
        if self.beside not in ("less", "more") or not this or not that or this == that:
            return text
        return f"{text} ({that / this if self.beside == 'less' else this / that:.1f}x)"


@dataclass(frozen=True)
class Comparison:
    """One table of the demo as data, which prints once it has outcomes.

    Attributes:
        title: a format with the fields of `Settings`, and {device}.
        cases: the rows. Neighbours with the same wrapper share a process and a model.
        measure: sets up the model of such neighbours, runs them, and holds them to the first case of all.
        per_length: whether cases are run at every prompt length; those of one "length" are compared.
        on_ranks: whether cases start processes of their own, and are left out unless ranks are asked for.
        wide: whether a random checkpoint is as wide as gpt-oss-20b.
        dtype: which dtype to load in, by the one that is asked for ("auto" for a model of the user's, if none is);
            None takes that itself.
    """

    title: str
    columns: tuple[Column, ...]
    footnote: str
    cases: tuple[Case, ...]
    measure: Callable[[Sequence[Case], Settings], Iterator[Step]]
    per_length: bool = False
    on_ranks: bool = False
    wide: bool = False
    dtype: Callable[[str | None], str] | None = None
    outcomes: tuple[Outcome, ...] = ()

    @property
    def table(self) -> Table:
        """A row for each outcome, in the order of their lengths."""
        lengths = [outcome.figures.get("length", 0) for outcome in self.outcomes]
        pairs = sorted(zip(lengths, self.outcomes, strict=True), key=lambda pair: pair[0])
        firsts = dict(reversed(pairs))
        rows = [[column.cell(outcome, firsts[length]) for column in self.columns] for length, outcome in pairs]
        return Table([column.heading for column in self.columns], rows)

    def __str__(self) -> str:
        return f"{self.title}\n\n{self.table}\n\n{self.footnote}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.title)}</p>{self.table._repr_html_()}<p>{html.escape(self.footnote)}</p>"


@dataclass(frozen=True)
class DemoReport:
    """All comparisons, and the plan for this machine: prints as text, and shows as HTML in a notebook."""

    comparisons: tuple[Comparison, ...]
    plan: str

    @property
    def problems(self) -> tuple[str, ...]:
        """What is beyond the tolerance, in all rows; empty if every case computes the same model."""
        outcomes = (outcome for comparison in self.comparisons for outcome in comparison.outcomes)
        return tuple(problem for outcome in outcomes for problem in outcome.problems)

    @property
    def notes(self) -> str:
        """What stands below the tables: problems, what is on the last model of each, and the plan."""
        explanations = (comparison.outcomes[-1].explanation for comparison in self.comparisons)
        parts = [
            "\n".join(f"NOT THE SAME: {problem}" for problem in self.problems),
            *explanations,
            self.plan,
        ]
        return "\n\n".join(filter(None, parts))

    def __str__(self) -> str:
        return "\n\n".join((*map(str, self.comparisons), self.notes))

    def _repr_html_(self) -> str:
        tables = "".join(comparison._repr_html_() for comparison in self.comparisons)
        return f"{tables}<pre style='white-space:pre;overflow-x:auto'>{html.escape(self.notes)}</pre>"

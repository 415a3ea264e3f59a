"""The one shape of all benchmarks: cases that are set up, run and verified, and are shown only after that.

A benchmark is a module with `SETTINGS`, its defaults, and `cases(settings, folder)`, which may write to that folder.
One that has a `conclude(points)` says what all its points mean together.
"""

from __future__ import annotations

import string
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from benchmarks.harness import record
from gptoss_opt.table import Table

Point = dict[str, Any]
"""A point is what a case found, as JSON takes it: one line of the results."""


@dataclass(frozen=True)
class Settings:
    """What the command line can set. A benchmark with more to set derives from this.

    Attributes:
        only: run only the cases whose name contains this, and write no results.
        repeats: how often each contender takes its turn.
        threads: the CPU threads of this process and of the contenders.
        folder: where checkpoints are written for as long as the run takes; the system's temporary folder if empty.
    """

    only: str = ""
    repeats: int = 3
    threads: int = 2
    folder: str = ""

    def command(self, name: str) -> str:
        """The command that runs all of a benchmark with these settings."""
        parts = ["python -m benchmarks", name]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("only", "folder") and value is not False:
                parts.append(f"--{field.name}" if value is True else f"--{field.name} {value}")
        return " ".join(parts)


@dataclass(frozen=True)
class Case(ABC):
    """One thing to measure.

    Attributes:
        name: the name in the results, and what `--only` looks at.
        columns: a line of headings, and below it a line with the format of each one's cells (see `Cells`), parted by
            bars. Cases with the same headings share a table.
    """

    name: str
    columns: ClassVar[str]

    def setup(self) -> Any:
        """What is needed before anything is measured; `run` and `verify` get it."""
        return None

    @abstractmethod
    def run(self, made: Any, repeats: int) -> list[Point]:
        """The measured points."""

    @abstractmethod
    def verify(self, made: Any, points: list[Point]) -> None:
        """Raise AssertionError where what was measured is not what it should be; add to the points what this found."""

    def rows(self, points: list[Point]) -> Iterable[Mapping[str, Any]]:
        """The rows of the table, with the values that the formats name."""
        return points

    def missed(self, points: list[Point]) -> list[str]:
        """What was asked for and is not reached, in sentences."""
        return []

    def points(self, repeats: int) -> list[Point]:
        """The verified points."""
        made = self.setup()
        points = self.run(made, repeats)
        self.verify(made, points)
        return [{"case": self.name, **point} for point in points]


class Cells(string.Formatter):
    """Formats of cells: those of `str.format`, and the conversions !m, !k, !M, !G and !i, which scale a number.

    Example:
        >>> CELLS.cell("{seconds!m:.1f} ms", {"seconds": 0.25}), CELLS.cell(">= {asked:g}x", {"asked": None})
        ('250.0 ms', '')
    """

    SCALES: ClassVar = {"m": 1e3, "k": 1e-3, "M": 1e-6, "G": 1e-9, "i": 2**-20}

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """A number times the scale of its conversion: thousandths, thousands, millions, billions or MiB."""
        return value * self.SCALES[conversion] if conversion else value

    def cell(self, pattern: str, row: Mapping[str, Any]) -> str:
        """The values of a row in a format, or nothing where the row lacks one of them or it is None."""
        try:
            return self.vformat(pattern, (), {name: value for name, value in row.items() if value is not None})
        except KeyError:
            return ""


CELLS = Cells()


def tables(found: Iterable[tuple[Case, list[Point]]]) -> list[Table]:
    """The points as tables, one for each set of headings."""
    rows: dict[tuple[str, ...], list[list[str]]] = {}
    for case, points in found:
        headings, patterns = ([part.strip() for part in line.split("|")] for line in case.columns.strip().splitlines())
        rows.setdefault(tuple(headings), []).extend(
            [CELLS.cell(pattern, {"case": case.name, **row}) for pattern in patterns] for row in case.rows(points)
        )
    return [Table(headings, cells) for headings, cells in rows.items()]


def run(
    name: str,
    settings: Settings,
    cases: Callable[[Any, Path], Sequence[Case]],
    conclude: Callable[[list[Point]], str] | None = None,
) -> None:
    """Run the cases of a benchmark, print their tables and, if all ran, what they conclude, and write the results."""
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory(dir=settings.folder or None) as folder:
        known = cases(settings, Path(folder))
        chosen = [case for case in known if settings.only in case.name]
        if not chosen:
            names = "".join(f"\n  {case.name}" for case in known)
            raise SystemExit(f"no case of {name} has {settings.only!r} in its name. There are:{names}")
        found: list[tuple[Case, list[Point]]] = []
        try:
            found.extend((case, case.points(settings.repeats)) for case in tqdm(chosen, unit="case"))
        finally:
            # What was measured before a later case failed, or the user stopped it, is shown as well.
            print(*tables(found), sep="\n\n")
        for line in [line for case, points in found for line in case.missed(points)]:
            print(f"NOT REACHED: {line}")
        if not settings.only:
            points = [point for _, points in found for point in points]
            if conclude:
                print(conclude(points))
            print(f"written: {record(name, points, settings.command(name))}")

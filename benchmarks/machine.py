"""The machine's own limits as a case, so that results say what they are to be seen against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.case import Case, Point


@dataclass(frozen=True)
class Machine(Case):
    """Rates of this machine by their names, in billions a second. They are measured once in a process."""

    rates: Mapping[str, Callable[[], float]]
    columns = """
        machine | rate
        {case}  | {rate:.1f} {name}
    """

    def run(self, made: None, repeats: int) -> list[Point]:
        return [{name: round(rate() / 1e9, 1) for name, rate in self.rates.items()}]

    def verify(self, made: None, points: list[Point]) -> None:
        assert all(rate > 0 for rate in points[0].values()), points

    def rows(self, points: list[Point]) -> Iterable[Mapping[str, Any]]:
        return [{"name": name, "rate": points[0][name]} for name in self.rates]

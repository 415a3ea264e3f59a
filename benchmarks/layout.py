"""How long it takes to compute what each rank holds of the released models, without weights or other processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.case import Case, Point, Settings
from benchmarks.harness import alternate
from benchmarks.step_model import RELEASED, bytes_held

DEGREES = (1, 2, 4, 8)
MAX_SECONDS = 2.0


@dataclass(frozen=True)
class Layouts(Case):
    """The packed shapes on 1 to 8 ranks; the models, which have no memory, are there already."""

    columns = """
        case   | ranks   | seconds       | asked
        {case} | {ranks} | {seconds:.3f} | < {asked:g}
    """

    def run(self, made: None, repeats: int) -> list[Point]:
        held = {
            f"{size} on {degree}": partial(bytes_held, RELEASED[size], degree, packed=True)
            for size, degree in itertools.product(RELEASED, DEGREES)
        }
        seconds = {name: round(median(taken), 4) for name, taken in alternate(held, repeats).items()}
        bytes_of = {name: compute() for name, compute in held.items()}
        return [
            {"seconds": seconds, "in all": round(sum(seconds.values()), 4), "asked": MAX_SECONDS, "bytes": bytes_of}
        ]

    def verify(self, made: None, points: list[Point]) -> None:
        """The ranks hold all of the parameters together, and no more than an even share and what is not split."""
        held = points[0]["bytes"]
        for size, degree in itertools.product(RELEASED, DEGREES):
            share = held[f"{size} on {degree}"] * degree / held[f"{size} on 1"]
            assert 1 <= share < 1.05, (size, degree, share)

    def rows(self, points: list[Point]) -> Iterable[Mapping[str, Any]]:
        for point in points:
            for name, taken in (point["seconds"] | {"all": point["in all"]}).items():
                yield {"ranks": name, "seconds": taken, "asked": point["asked"] if name == "all" else None}

    def missed(self, points: list[Point]) -> list[str]:
        taken = points[0]["in all"]
        return [f"the layouts take {taken:.1f} s, not less than {MAX_SECONDS:g}"] * (taken >= MAX_SECONDS)


def cases(settings: Settings, folder: Path) -> list[Case]:
    """One case: all layouts in turn."""
    return [Layouts("layout")]


SETTINGS = Settings()

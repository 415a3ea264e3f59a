"""`Verification`: what `verify` found, as a verdict and a table."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import Any

from ..table import Table
from .drift import Drift


@dataclass(frozen=True)
class Verification:
    """What `verify` found: prints as a verdict and a table, and holds the facts.

    Attributes:
        drifts: every part of every layer by every backend.
        title: what was verified, in words.
    """

    drifts: tuple[Drift, ...]
    title: str

    @property
    def right(self) -> bool:
        """Whether everything is within what rounding explains."""
        return all(drift.right for drift in self.drifts)

    @property
    def wrong(self) -> list[Drift]:
        """What is not, the worst first."""
        return sorted((drift for drift in self.drifts if not drift.right), key=lambda drift: -drift.share)

    @property
    def verdict(self) -> str:
        """A sentence."""
        worst = self.wrong[0] if self.wrong else max(self.drifts, key=lambda drift: drift.share)
        count = len(self.drifts)
        if self.right:
            return (
                f"Right: all {count} results are what plain eager computations give, as far as rounding goes; the "
                f"largest error is {worst.share:.0%} of what is allowed, in {worst.where}."
            )
        backends = sorted({f"{drift.part} by {drift.backend}" for drift in self.wrong})
        return (
            f"WRONG: {len(self.wrong)} of {count} results are not what plain eager computations give "
            f"({', '.join(backends)}). The worst is {worst.where}: {worst.share:,.1f} times what is allowed. Name "
            "another backend for that wrapper, or undo it, and report it with this table."
        )

    @property
    def table(self) -> Table:
        """The worst layer of each part, backend and kind."""
        worst: dict[tuple[str, str, str], Drift] = {}
        for drift in self.drifts:
            key = drift.part, drift.backend, drift.kind
            if key not in worst or drift.share > worst[key].share:
                worst[key] = drift
        rows = [
            (
                *key,
                "" if drift.layer is None else str(drift.layer),
                f"{drift.share:.0%}" if drift.share < 10 else f"{drift.share:,.0f} times",
                drift.norm,
                "yes" if drift.right else "NO",
            )
            for key, drift in sorted(worst.items())
        ]
        return Table(("part", "backend", "what", "worst layer", "of allowed", "by", "right"), rows)

    def to_dict(self) -> dict[str, Any]:
        """All of it as what JSON can hold."""
        # JSON has no infinities.
        drifts = [
            {**vars(drift), "share": drift.share if math.isfinite(drift.share) else None, "right": drift.right}
            for drift in self.drifts
        ]
        return {"title": self.title, "right": self.right, "verdict": self.verdict, "drifts": drifts}

    def __str__(self) -> str:
        return f"{self.title}\n{self.verdict}\n\n{self.table}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in (self.title, self.verdict))
        return lines + self.table._repr_html_()

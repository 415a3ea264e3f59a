"""`Benchmark`: what `bench` found, as a verdict and a table."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from ..core import Stack
from ..model.training_memory import written
from ..planner.speed import Rate
from ..table import Cell, Table
from ..verification import Verification
from .contender import Loaded, Turn

OURS, PEER = "ours", "transformers"
WORK = {"decode": "decoding", "prefill": "prompt"}
"""What is timed, by the planner's names, in words."""
WIDTH = 24
"""How wide the words are, in characters, that say why transformers is not measured."""


class Agreement(NamedTuple):
    """How far our logits of a prompt are from transformers', and how far they may be, as parts of their norm."""

    off: float
    allowed: float

    @property
    def right(self) -> bool:
        """Whether it is less than what is allowed; a NaN never is."""
        return self.off < self.allowed


@dataclass(frozen=True)
class Measured:
    """What was measured of one contender.

    Attributes:
        prompt: how many tokens the prompt has.
        limits: what the machine allows at most, by "decode" and "prefill": known once all turns were taken.
        loaded: what it took until the model was there; None if it never was.
        turns: what each turn took; empty if none was timed.
        absent: why it is not measured, in words; None if it is.
    """

    prompt: int
    limits: Mapping[str, Rate] = field(default_factory=dict)
    loaded: Loaded | None = None
    turns: tuple[Turn, ...] = ()
    absent: str | None = None

    @property
    def timed(self) -> bool:
        """Whether there are rates."""
        return bool(self.turns) and self.absent is None

    @property
    def rates(self) -> dict[str, float]:
        """Tokens a second in the median turn, by "decode" and "prefill"."""
        if not self.timed:
            return {}
        return {
            "decode": 1 / median(turn.token for turn in self.turns),
            "prefill": self.prompt / median(turn.prompt for turn in self.turns),
        }

    @property
    def shares(self) -> dict[str, float]:
        """Which part of the limit the rates are."""
        return {what: rate / self.limits[what].tokens_per_second for what, rate in self.rates.items()}

    def to_dict(self) -> dict[str, Any]:
        """All of it as what JSON can hold."""
        return {
            "absent": self.absent,
            "seconds_to_load": self.loaded and self.loaded.seconds,
            "peak_bytes": self.loaded and self.loaded.peak_bytes,
            "tokens_per_second": self.rates,
            "share_of_limit": self.shares,
            "limits": {what: {**vars(limit)} for what, limit in self.limits.items()},
            "turns": [turn._asdict() for turn in self.turns],
        }


@dataclass(frozen=True)
class Benchmark:
    """What `bench` found: prints as a verdict and a table, and holds the facts.

    Attributes:
        title: the model, the work and the machine, in words.
        stack: our wrappers.
        ours, theirs: what was measured of our model, and of transformers'.
        verification: our model, part by part, beside plain computations; None if it was never there.
        agreement: our logits beside transformers'; None if one of both was never there.
    """

    title: str
    stack: Stack
    ours: Measured
    theirs: Measured
    verification: Verification | None
    agreement: Agreement | None

    @property
    def right(self) -> bool:
        """Whether our model was there, and found to be right. If not, there are no rates."""
        if self.ours.absent or self.verification is None or not self.verification.right:
            return False
        return self.agreement is None or self.agreement.right

    @property
    def ratios(self) -> dict[str, float]:
        """How many times as fast as transformers ours is, in the median turn, by "decode" and "prefill"."""
        if not (self.ours.timed and self.theirs.timed):
            return {}
        both = list(zip(self.ours.turns, self.theirs.turns, strict=True))
        return {
            "decode": median(theirs.token / ours.token for ours, theirs in both),
            "prefill": median(theirs.prompt / ours.prompt for ours, theirs in both),
        }

    @property
    def verdict(self) -> str:
        """A sentence or a few."""
        wrong = "WRONG, so that nothing was timed:"
        if self.ours.absent:
            return f"Not measured: {OURS} {self.ours.absent}."
        if self.verification is not None and not self.verification.right:
            return f"{wrong} {self.verification.verdict.removeprefix('WRONG: ')}"
        if self.agreement is not None and not self.agreement.right:
            off, allowed = self.agreement
            return (
                f"{wrong} on the same prompt our logits are {off:.2f} of their norm from transformers', and "
                f"{allowed:.2f} is half of what another prompt changes. Leave wrappers out one by one to find which."
            )
        beside = "as far as rounding goes" if self.agreement is None else "and the logits those of transformers"
        return f"Right: all results are those of plain computations, {beside}. {' '.join(map(self._fast, WORK))}"

    def _fast(self, what: str) -> str:
        rate, share, limit = self.ours.rates[what], self.ours.shares[what], self.ours.limits[what]
        times = f", {self.ratios[what]:.1f} times as fast as transformers" if self.ratios else ""
        return (
            f"{WORK[what].capitalize()}: {_number(rate)} tokens/s{times}, {_part(share)} of the limit by {limit.bound}."
        )

    @property
    def table(self) -> Table:
        """What was measured, ours beside transformers."""
        both = self.ours, self.theirs
        rows: list[tuple[Cell, ...]] = []
        for what, name in WORK.items():
            rates, shares = ([one.rates.get(what) for one in both], [one.shares.get(what) for one in both])
            ratio = f"{self.ratios[what]:.2f}x" if self.ratios else ""
            rows.append((f"{name}, tokens/s", *_cells(rates, _number), ratio))
            bounds = " and ".join(dict.fromkeys(one.limits[what].bound for one in both))
            rows.append((f"  of the limit by {bounds}", *_cells(shares, _part), ""))
        seconds = [one.loaded.seconds if one.loaded else None for one in both]
        peaks = [one.loaded.peak_bytes if one.loaded else None for one in both]
        rows.append(("seconds to load", *_cells(seconds, "{:.1f}".format), _ratio(*seconds)))
        rows.append(("peak memory", *_cells(peaks, written), _ratio(*peaks)))
        if self.theirs.absent:
            # In words, in its column.
            rows[0] = (*rows[0][:2], tuple(textwrap.wrap(self.theirs.absent, WIDTH)), "")
        return Table(("what", OURS, PEER, "ratio"), rows)

    @property
    def tables(self) -> tuple[Table, Table]:
        """What was measured, and with which wrappers."""
        return self.table, Table((f"wrappers of {OURS}",), [(repr(wrapper),) for wrapper in self.stack] or [("none",)])

    def to_dict(self) -> dict[str, Any]:
        """All of it as what JSON can hold."""
        return {
            "title": self.title,
            "verdict": self.verdict,
            "right": self.right,
            "stack": self.stack.to_json(),
            OURS: self.ours.to_dict(),
            PEER: self.theirs.to_dict(),
            "ratios": self.ratios,
            "verification": self.verification and self.verification.verdict,
            "agreement": self.agreement and self.agreement._asdict(),
        }

    def __str__(self) -> str:
        return "\n\n".join([f"{self.title}\n{self.verdict}", *map(str, self.tables)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in (self.title, self.verdict))
        return lines + "".join(table._repr_html_() for table in self.tables)


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def _part(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def _cells(values: Sequence[float | None], form: Callable[[float], str]) -> list[str]:
    return ["" if value is None else form(value) for value in values]


def _ratio(ours: float | None, theirs: float | None) -> str:
    return f"{theirs / ours:.2f}x" if ours and theirs else ""

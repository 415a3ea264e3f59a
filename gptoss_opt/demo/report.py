"""What the demo prints: one line per stack and length, and the text around it."""

from __future__ import annotations

from dataclasses import dataclass

HEADINGS = (
    "length",
    "stack",
    "same greedy tokens",
    "max logit diff",
    "sink grad diff",
    "generate",
    "train step",
    "peak memory",
)
FOOTNOTE = """\
Differences and (ratios) are to the first row of each length; the sink gradient difference is relative.
Each was run once. Train step: forward with labels, and backward. Peak memory: the most that both took beyond the
loaded model (on CUDA as torch counts it, on Linux the resident memory of the process, n/a elsewhere)."""


@dataclass(frozen=True)
class Result:
    """One line of the table: a stack at a length, against the first row at that length.

    Attributes:
        new_tokens, same_tokens: how many greedy tokens, and how many are the same before the first that differs.
        logit_difference: the largest absolute one, over all positions.
        sink_difference: |difference| / |gradient| of all sinks; None if they take no gradient.
        problems: what is beyond the tolerance, as sentences.
        peak_mib: memory beyond the loaded model, at its peak; None where it cannot be measured.
    """

    stack: str
    length: int
    new_tokens: int
    same_tokens: int
    logit_difference: float
    sink_difference: float | None
    problems: tuple[str, ...]
    generate_seconds: float
    train_seconds: float
    peak_mib: float | None

    def cells(self, first: Result) -> tuple[str, ...]:
        """The line as text."""
        same = "yes" if self.same_tokens == self.new_tokens else f"first {self.same_tokens} of {self.new_tokens}"
        sinks = "no gradient" if self.sink_difference is None else f"{self.sink_difference:.1e}"
        agreement = ("-", "-", "-") if self is first else (same, f"{self.logit_difference:.1e}", sinks)
        amounts = (
            ("{:.2f} s", self.generate_seconds, first.generate_seconds),
            ("{:.2f} s", self.train_seconds, first.train_seconds),
            ("{:.0f} MiB", self.peak_mib, first.peak_mib),
        )
        return (str(self.length), self.stack, *agreement, *(_amount(*amount) for amount in amounts))


def _amount(unit: str, this: float | None, first: float | None) -> str:
    if this is None:
        return "n/a"
    return unit.format(this) + (f" ({first / this:.1f}x)" if first and this and first != this else "")


@dataclass(frozen=True)
class Report:
    """All results, and what prints around them. `str` is the whole text."""

    title: str
    results: tuple[Result, ...]
    explanation: str
    code: str

    @property
    def problems(self) -> tuple[str, ...]:
        """What is beyond the tolerance, in all rows; empty if every stack gave the same model."""
        return tuple(problem for result in self.results for problem in result.problems)

    def __str__(self) -> str:
        first: dict[int, Result] = {}
        lines = [HEADINGS, *(line.cells(first.setdefault(line.length, line)) for line in self.results)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, tuple("-" * width for width in widths))
        table = "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
        verdict = "\n".join(f"NOT THE SAME: {problem}" for problem in self.problems)
        parts = (self.title, table, FOOTNOTE, verdict, self.explanation, self.code)
        return "\n\n".join(part for part in parts if part)

"""What the demo prints: a line for each stack in each table, and the text around them."""

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

DECODE_HEADINGS = ("experts", "same greedy tokens", "max logit diff", "load", "expert weights", "decode")
DECODE_FOOTNOTE = """\
Load: from the file to a model; the first row by transformers, the others by gptoss_opt.load. Expert weights: as they
are stored. Decode: one token after the other, by the median step of generate."""

SHARDED_HEADINGS = ("held by", "same greedy tokens", "max logit diff", "parameters of a rank", "decode")
SHARDED_FOOTNOTE = """\
Every rank computes its part of every token. On one machine's cores, ranks share what one process has to itself: what
they save here is memory. Across machines: docs/several_nodes.md."""

SERVED_HEADINGS = ("served by", "same greedy tokens", "max logit diff", "speed", "first token", "keys and values")
SERVED_FOOTNOTE = """\
Same greedy tokens: before the first of each prompt that differs. Max logit diff: after each prompt, less the mean.
Speed: by the tokens that were asked for. First token: the median; generate gives all at the end. Keys and values: the
most that was held, of pages those in use."""


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
        sinks = "no gradient" if self.sink_difference is None else f"{self.sink_difference:.1e}"
        agreement = ("-", "-", "-") if self is first else (_same(self), f"{self.logit_difference:.1e}", sinks)
        amounts = (
            ("{:.2f} s", self.generate_seconds, first.generate_seconds),
            ("{:.2f} s", self.train_seconds, first.train_seconds),
            ("{:.0f} MiB", self.peak_mib, first.peak_mib),
        )
        return (str(self.length), self.stack, *agreement, *(_amount(*amount) for amount in amounts))


@dataclass(frozen=True)
class DecodeResult:
    """One line of the second table: a way to hold and compute the experts, against the first.

    Attributes:
        new_tokens, same_tokens, logit_difference, problems: as in `Result`.
        load_seconds: from the file to a model.
        expert_mib: of the expert weights, as they are stored.
        tokens_per_second: of decoding, one row.
    """

    stack: str
    new_tokens: int
    same_tokens: int
    logit_difference: float
    problems: tuple[str, ...]
    load_seconds: float
    expert_mib: float
    tokens_per_second: float

    def cells(self, first: DecodeResult) -> tuple[str, ...]:
        """The line as text."""
        ratio = "" if self is first else f" ({self.tokens_per_second / first.tokens_per_second:.1f}x)"
        return (
            self.stack,
            *(("-", "-") if self is first else (_same(self), f"{self.logit_difference:.1e}")),
            _amount("{:.2f} s", self.load_seconds, first.load_seconds),
            _amount("{:.1f} MiB", self.expert_mib, first.expert_mib),
            f"{self.tokens_per_second:.1f} tokens/s{ratio}",
        )


@dataclass(frozen=True)
class ShardedResult:
    """One line of the third table: a model that several processes hold together, against one process.

    Attributes:
        new_tokens, same_tokens, logit_difference, problems: as in `Result`.
        held_mib: of all parameters, what the first rank holds.
        tokens_per_second: of decoding, one row.
    """

    stack: str
    new_tokens: int
    same_tokens: int
    logit_difference: float
    problems: tuple[str, ...]
    held_mib: float
    tokens_per_second: float

    def cells(self, first: ShardedResult) -> tuple[str, ...]:
        """The line as text."""
        return (
            self.stack,
            *(("-", "-") if self is first else (_same(self), f"{self.logit_difference:.1e}")),
            f"{self.held_mib:.1f} MiB ({self.held_mib / first.held_mib:.0%})",
            f"{self.tokens_per_second:.1f} tokens/s",
        )


@dataclass(frozen=True)
class ServedResult:
    """One line of the fourth table: a way to complete several prompts at once, against the first.

    Attributes:
        new_tokens, same_tokens: of all prompts; the same are those before the first of each that differs.
        logit_difference, problems: as in `Result`, of the logits after each prompt.
        tokens_per_second: all that were asked for, by the time until the last was there.
        first_token_ms: until a prompt had its first token, by the median; None if all come at the end.
        kv_kib: of keys and values, the most that was held.
    """

    stack: str
    new_tokens: int
    same_tokens: int
    logit_difference: float
    problems: tuple[str, ...]
    tokens_per_second: float
    first_token_ms: float | None
    kv_kib: float

    def cells(self, first: ServedResult) -> tuple[str, ...]:
        """The line as text."""
        same = "yes" if self.same_tokens == self.new_tokens else f"{self.same_tokens} of {self.new_tokens}"
        ratio = "" if self is first else f" ({self.tokens_per_second / first.tokens_per_second:.1f}x)"
        return (
            self.stack,
            *(("-", "-") if self is first else (same, f"{self.logit_difference:.1e}")),
            f"{self.tokens_per_second:.1f} tokens/s{ratio}",
            "-" if self.first_token_ms is None else f"{self.first_token_ms:.0f} ms",
            _amount("{:.0f} KiB", self.kv_kib, first.kv_kib),
        )


def _same(result: Result | DecodeResult | ShardedResult) -> str:
    same, of = result.same_tokens, result.new_tokens
    return "yes" if same == of else f"first {same} of {of}"


def _amount(unit: str, this: float | None, first: float | None) -> str:
    if this is None:
        return "n/a"
    return unit.format(this) + (f" ({first / this:.1f}x)" if first and this and first != this else "")


@dataclass(frozen=True)
class Report:
    """All results, and what prints around them. `str` is the whole text."""

    title: str
    results: tuple[Result, ...]
    decode_title: str
    decode_results: tuple[DecodeResult, ...]
    explanation: str
    code: str
    sharded_title: str = ""
    sharded_results: tuple[ShardedResult, ...] = ()
    served_title: str = ""
    served_results: tuple[ServedResult, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """What is beyond the tolerance, in all rows; empty if every stack gave the same model."""
        results: tuple[Result | DecodeResult | ShardedResult | ServedResult, ...]
        results = (*self.results, *self.decode_results, *self.sharded_results, *self.served_results)
        return tuple(problem for result in results for problem in result.problems)

    def __str__(self) -> str:
        first: dict[int, Result] = {}
        parts = [self.title]
        parts += [
            _table(HEADINGS, [line.cells(first.setdefault(line.length, line)) for line in self.results]),
            FOOTNOTE,
        ]
        if self.decode_results:
            lines = [line.cells(self.decode_results[0]) for line in self.decode_results]
            parts += [self.decode_title, _table(DECODE_HEADINGS, lines), DECODE_FOOTNOTE]
        if self.sharded_results:
            shards = [line.cells(self.sharded_results[0]) for line in self.sharded_results]
            parts += [self.sharded_title, _table(SHARDED_HEADINGS, shards), SHARDED_FOOTNOTE]
        if self.served_results:
            served = [line.cells(self.served_results[0]) for line in self.served_results]
            parts += [self.served_title, _table(SERVED_HEADINGS, served), SERVED_FOOTNOTE]
        parts += ["\n".join(f"NOT THE SAME: {problem}" for problem in self.problems), self.explanation, self.code]
        return "\n\n".join(part for part in parts if part)


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = [headings, tuple("-" * width for width in widths), *rows]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

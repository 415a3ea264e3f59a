"""What a batcher tells of its work."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields

import torch

LAST = 10_000
"""Of so many times the percentiles are taken."""

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Stats:
    """The work of a batcher so far. Times are in seconds; percentiles are the 50th, 90th and 99th.

    Attributes:
        running, waiting: sequences.
        finished: requests that came to their end, however.
        tokens_in, tokens_out: computed tokens of prompts, and generated ones.
        tokens_in_per_second, tokens_out_per_second: the same by the time spent in steps.
        num_steps: forwards of the model.
        pages_used, most_pages_used, num_pages: of key/value memory, now, at the most, and all.
        kv_bytes: that all pages take.
        prefix_tokens: tokens that were not computed, as another sequence had done so.
        preemptions: how often a sequence had to give its pages back.
        cuda_graphs: how many steps were captured, or why none is.
        time_to_first_token: from submit, of the last requests.
        time_between_tokens: of one request, of the last tokens.
    """

    running: int
    waiting: int
    finished: int
    tokens_in: int
    tokens_out: int
    tokens_in_per_second: float
    tokens_out_per_second: float
    num_steps: int
    pages_used: int
    most_pages_used: int
    num_pages: int
    kv_bytes: int
    prefix_tokens: int
    preemptions: int
    cuda_graphs: str
    time_to_first_token: dict[int, float]
    time_between_tokens: dict[int, float]

    def __str__(self) -> str:
        return "\n".join(f"{one.name:<22} {_shown(getattr(self, one.name))}" for one in fields(self))


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"p{name} {seconds * 1e3:,.1f} ms" for name, seconds in value.items()) or "none yet"
    if isinstance(value, str):
        return value
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def percentiles(times: Collection[float]) -> dict[int, float]:
    """Those of some times; none of none."""
    if not times:
        return {}
    ranks = torch.tensor(PERCENTILES, dtype=torch.float64) / 100
    values = torch.tensor(list(times), dtype=torch.float64).quantile(ranks)
    return dict(zip(PERCENTILES, values.tolist(), strict=True))


@dataclass
class Counts:
    """What is counted on the way."""

    finished: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    first: deque[float] = field(default_factory=lambda: deque(maxlen=LAST))
    between: deque[float] = field(default_factory=lambda: deque(maxlen=LAST))

    @property
    def tokens_in_per_second(self) -> float:
        """By the time spent in steps."""
        return self.tokens_in / self.seconds if self.seconds else 0.0

    @property
    def tokens_out_per_second(self) -> float:
        """By the time spent in steps."""
        return self.tokens_out / self.seconds if self.seconds else 0.0

    def token(self, times: list[float], submitted: float) -> None:
        """One more token of a request, by the times of all it has."""
        self.tokens_out += 1
        (self.between if len(times) > 1 else self.first).append(times[-1] - (times[-2] if times[1:] else submitted))

    def step(self, num_prompt_tokens: Iterable[int], seconds: float) -> None:
        """One more forward."""
        self.num_steps += 1
        self.tokens_in += sum(num_prompt_tokens)
        self.seconds += seconds

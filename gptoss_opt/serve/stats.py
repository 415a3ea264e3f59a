"""The numbers that a batcher tells of its work."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field, fields

import torch

from ..table import Table

MAX_TIMES = 10_000
"""How many times, the last ones, percentiles are taken of."""

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, repr=False)
class Stats:
    """The work of a batcher so far: prints as a table, and shows as HTML in a notebook.

    Times are in seconds; percentiles are the 50th, 90th and 99th.

    Attributes:
        running, waiting: how many sequences run, and how many wait.
        finished: how many requests came to their end, whether completed, cancelled or failed.
        tokens_in, tokens_out: how many tokens of prompts were computed, and how many were generated.
        tokens_in_per_second, tokens_out_per_second: the same, divided by the time spent in steps.
        num_steps: how many forwards of the model were made.
        pages_used, most_pages_used, num_pages: how many pages of key/value memory are used now, were used at the most,
            and there are.
        kv_bytes: how many bytes all pages take.
        prefix_tokens: how many tokens were not computed, as another sequence had done so.
        preemptions: how often a sequence had to give its pages back.
        cuda_graphs: how many steps were captured, or why none is.
        time_to_first_token: percentiles of the time from submit to the first token, over the last requests.
        time_between_tokens: percentiles of the time between two tokens of a request, over the last tokens.
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

    @property
    def table(self) -> Table:
        """A row for each number."""
        return Table(
            ("of the batcher", "so far"), [(one.name, _shown(getattr(self, one.name))) for one in fields(self)]
        )

    def __str__(self) -> str:
        return "\n".join(f"{name:<22} {value}" for name, value in self.table.rows)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def prometheus(self) -> str:
        """All numbers in Prometheus' text format, version 0.0.4.

        Names begin with `gptoss_opt_`. Percentiles are quantiles, in seconds; what only grows is a counter.
        """
        lines: list[str] = []
        for one in fields(self):
            value, name = getattr(self, one.name), f"gptoss_opt_{one.name}"
            if isinstance(value, str):
                continue
            if isinstance(value, dict):
                name += "_seconds"
                lines.append(f"# TYPE {name} summary")
                lines += [f'{name}{{quantile="{percent / 100:g}"}} {seconds}' for percent, seconds in value.items()]
                continue
            lines += [f"# TYPE {name} {'counter' if one.name in COUNTERS else 'gauge'}", f"{name} {value}"]
        return "\n".join(lines) + "\n"


COUNTERS = {"finished", "tokens_in", "tokens_out", "num_steps", "prefix_tokens", "preemptions"}
"""What only grows."""


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"p{name} {seconds * 1e3:,.1f} ms" for name, seconds in value.items()) or "none yet"
    if isinstance(value, str):
        return value
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def percentiles(times: Collection[float]) -> dict[int, float]:
    """The `PERCENTILES` of some times, by their number; empty where there are no times."""
    if not times:
        return {}
    ranks = torch.tensor(PERCENTILES, dtype=torch.float64) / 100
    values = torch.tensor(list(times), dtype=torch.float64).quantile(ranks)
    return dict(zip(PERCENTILES, values.tolist(), strict=True))


@dataclass
class Counts:
    """What is counted from step to step; `Stats` says what the names mean.

    Attributes:
        seconds: the time spent in steps.
        first: the last times to a first token.
        between: the last times between two tokens.
    """

    finished: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    first: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_TIMES))
    between: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_TIMES))

    def per_second(self, num_tokens: int) -> float:
        """A number of tokens, divided by the time spent in steps."""
        return num_tokens / self.seconds if self.seconds else 0.0

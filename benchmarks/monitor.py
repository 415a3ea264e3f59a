"""What `with_monitor` costs: the same steps with and without it, in turn."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case, Point, Settings
from benchmarks.harness import device, median_ratio, seconds
from benchmarks.load import checkpoint
from gptoss_opt import (
    compose,
    load,
    monitor_of,
    undo,
    with_chunked_loss,
    with_fast_linears,
    with_flash_attention,
    with_lora,
    with_monitor,
    with_mxfp4_experts,
)

LAYERS, EVERY = 4, 10
ALLOWED = 1.02
FORWARDS = 20
"""Forwards of a turn: two of them are measured."""


@dataclass(frozen=True)
class Overhead(Case):
    """Decoding, or training of adapters, of four layers of the 20b's shapes."""

    folder: Path
    trains: bool
    columns = """
        case   | without            | with             | ratio         | asked
        {case} | {without!m:.1f} ms | {with!m:.1f} ms  | {ratio:.3f}x  | <= {asked}x
    """

    def setup(self) -> Any:
        stack = compose(with_mxfp4_experts(), with_flash_attention(), with_fast_linears())
        more = compose(with_lora(), with_chunked_loss()) if self.trains else compose()
        return load(checkpoint(self.folder, LAYERS), stack, more, device=device()).train(self.trains)

    def run(self, made: Any, repeats: int) -> list[Point]:
        tokens = torch.randint(2, 200_000, (1, 64)).to(made.device)

        def steps() -> None:
            if self.trains:
                for _ in range(FORWARDS // 4):
                    made(tokens, labels=tokens).loss.backward()
                return
            options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            made.generate(tokens, max_new_tokens=FORWARDS, min_new_tokens=FORWARDS, **options)

        times: dict[str, list[float]] = {"without": [], "with": []}
        steps()
        for _ in range(max(9, repeats)):
            times["without"].append(seconds(steps))
            with_monitor(made, every=EVERY, to=())
            times["with"].append(seconds(steps))
            undo(made, with_monitor)
        median = {name: statistics.median(taken) for name, taken in times.items()}
        ratio = median_ratio(times["with"], times["without"])
        return [{**median, "ratio": ratio, "asked": ALLOWED}]

    def verify(self, made: Any, points: list[Point]) -> None:
        """Forwards are measured at all."""
        with_monitor(made, every=EVERY, to=())
        for _ in range(EVERY + 1):
            made(torch.ones(1, 2, dtype=torch.long, device=made.device))
        assert len(monitor_of(made).steps) == 2
        undo(made, with_monitor)

    def missed(self, points: list[Point]) -> list[str]:
        ratio = points[0]["ratio"]
        return [] if ratio <= ALLOWED else [f"{self.name}: {ratio:.3f}x"]


def cases(settings: Settings, folder: Path) -> list[Case]:
    """Decoding and training."""
    overhead = partial(Overhead, folder=folder)
    return [overhead("decoding, every=10", trains=False), overhead("training of adapters, every=10", trains=True)]


SETTINGS = Settings()

"""A whole model for one user: decoding, and a prompt of 512 tokens, beside transformers, llama.cpp and vLLM.

Four layers of the 20b's shapes with its head of 201,088 words, bfloat16, experts packed where the contender takes them.
Each contender holds its model in a process of its own; one peer at a time runs in turn with ours. llama.cpp and vLLM
take part where GPTOSS_OPT_LLAMA_PYTHON and GPTOSS_OPT_VLLM_PYTHON name the Python of an environment that has them.
"""

from __future__ import annotations

import functools
import os
import random
import statistics
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case, Point, Settings
from benchmarks.contenders import (
    LLAMA_PYTHON,
    VLLM_PYTHON,
    Ask,
    Contender,
    Runs,
    checkpoints,
    generating,
    llama,
    transformers,
    vllm,
)
from benchmarks.harness import gemm_rate, read_rate
from benchmarks.load import apart, bytes_per_token
from benchmarks.machine import Machine
from gptoss_opt import load, with_mxfp4_experts
from gptoss_opt.testing import SIZES

LAYERS, PROMPT, LONG_PROMPT, NEW_TOKENS = 4, 16, 512, 32
ASKED = {"decode": {"llama.cpp": 1.15}, "prefill": dict.fromkeys(("llama.cpp", "vLLM", "transformers"), 1.5)}
OF_READ_RATE = 0.80


def bytes_of_a_token(packed: Path) -> float:
    """What one token must read of a packed model."""
    return bytes_per_token(load(packed, with_mxfp4_experts()))


@functools.cache
def bytes_read(packed: Path) -> float:
    """The same, by a process that gives its memory back: peers need it."""
    return float(apart(bytes_of_a_token, packed))


def prompt(length: int) -> list[int]:
    """Random tokens."""
    draw = random.Random(length)
    return [draw.randrange(2, SIZES["20b"].bos) for _ in range(length)]


@dataclass(frozen=True)
class Beside(Case):
    """Ours and one peer in turn. The time of decoding is that of many tokens less that of one."""

    folder: Path
    peer: str
    make: Callable[..., Runs]
    needs: str | None = None
    columns = """
        case   | what   | ours              | peer                | ratio        | of read rate | asked
        {case} | {what} | {ours:.1f} {unit} | {theirs:.1f} {unit} | {ratio:.2f}x | {share:.0%}  | >= {asked:g}x
    """

    def run(self, made: None, repeats: int) -> list[Point]:
        if self.needs and not os.environ.get(self.needs):
            return [{"absent": f"{self.needs} is not set"}]
        few, many, long = (Ask(prompt(PROMPT), 1), Ask(prompt(PROMPT), 1 + NEW_TOKENS), Ask(prompt(LONG_PROMPT), 1))
        found: dict[str, dict[str, list[float]]] = {"decode": {}, "prefill": {}}
        made_of = checkpoints(self.folder, "20b", LAYERS)
        rates, needed = [], bytes_read(made_of.packed)
        with ExitStack() as stack:
            # The peer loads first: some need twice their weights for that.
            both = {self.peer: Contender(self.make, made_of), "ours": Contender(generating, made_of, packed=True)}
            for one in both.values():
                stack.enter_context(closing(one))
            for _ in range(2 * repeats):
                rates.append(read_rate.__wrapped__())
                for name, one in both.items():
                    seconds = []
                    for ask in (few, many, long):
                        one.run([ask], warm=[few, long])
                        seconds.append(one.outcomes[-1].seconds)
                    found["decode"].setdefault(name, []).append((seconds[1] - seconds[0]) / NEW_TOKENS)
                    found["prefill"].setdefault(name, []).append(seconds[2])
            outputs = {name: one.outcomes[1].outputs[0] for name, one in both.items()}
        points = []
        for what, taken in found.items():
            median = {name: statistics.median(some) for name, some in taken.items()}
            ratios = [theirs / ours for ours, theirs in zip(taken["ours"], taken[self.peer], strict=True)]
            point: Point = {
                "what": what,
                "peer": self.peer,
                "seconds": {name: round(one, 5) for name, one in median.items()},
                "ratio": round(statistics.median(ratios), 3),
                "asked": ASKED[what].get(self.peer.split(",")[0]),
                "first tokens": {name: some[:8] for name, some in outputs.items()},
            }
            if what == "decode":
                shares = [needed / one / rate for one, rate in zip(taken["ours"], rates, strict=True)]
                point["bytes"] = needed
                point["share of read rate"] = round(statistics.median(shares), 3)
            points.append(point)
        return points

    def verify(self, made: None, points: list[Point]) -> None:
        """The first token is the same: later ones depend on how each rounds."""
        for point in points:
            firsts = {some[0] for some in point.get("first tokens", {}).values()}
            assert len(firsts) <= 1, point

    def rows(self, points: list[Point]) -> Iterable[Mapping[str, Any]]:
        for point in points:
            if "absent" in point:
                yield {"what": f"absent: {point['absent']}"}
                continue
            decode = point["what"] == "decode"
            seconds = {"ours": point["seconds"]["ours"], "theirs": point["seconds"][self.peer]}
            shown = {name: 1e3 * one if decode else LONG_PROMPT / one for name, one in seconds.items()}
            yield {**point, **shown, "unit": "ms" if decode else "tokens/s", "share": point.get("share of read rate")}

    def missed(self, points: list[Point]) -> list[str]:
        there = [point for point in points if "absent" not in point]
        slow = [f"{self.name}, {p['what']}: {p['ratio']}x" for p in there if p["ratio"] < (p["asked"] or 0)]
        shares = [p["share of read rate"] for p in there if p["what"] == "decode"]
        return slow + [f"{self.name}: decoding at {one:.0%} of the read rate" for one in shares if one < OF_READ_RATE]


def cases(settings: Settings, folder: Path) -> list[Case]:
    """The machine's limits, and each peer: transformers in each of its ways to compute experts."""
    rates: dict[str, Callable[[], float]] = {
        "GB/s read": read_rate,
        "GFLOP/s in bfloat16": partial(gemm_rate, torch.bfloat16),
    }
    ways = ("eager", "grouped_mm")
    return [
        Machine("machine", rates),
        Beside("beside llama.cpp", folder, "llama.cpp", llama, LLAMA_PYTHON),
        *(
            Beside(f"beside transformers, {way}", folder, f"transformers, {way}", partial(transformers, experts=way))
            for way in ways
        ),
        Beside("beside vLLM", folder, "vLLM", vllm, VLLM_PYTHON),
    ]


SETTINGS = Settings()

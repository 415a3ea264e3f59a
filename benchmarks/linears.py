"""Linear layers of gpt-oss-20b with few rows, natively and by torch, at each number of rows: which is faster when.

Each case reads other weights in every turn, as a model does from layer to layer, so that no cache holds them.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.case import Case, Point, Settings
from benchmarks.harness import alternate, gemm_rate, median_ratio, read_rate
from benchmarks.machine import Machine
from gptoss_opt.kernels import memory
from gptoss_opt.kernels.linear import linear, max_rows

SHAPES = {"q": (4096, 2880), "k and v": (512, 2880), "o": (2880, 4096), "head": (201_088, 2880)}
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
BYTES = 500e6
"""Of weights that are read one after the other, at least."""

Computing = dict[str, Callable[[], list[Tensor]]]


@functools.cache
def weights(shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """Random weights of one shape, more than a cache holds, on the pages that loaded weights have."""
    torch.manual_seed(0)
    count = max(1, round(BYTES / (shape[0] * shape[1] * dtype.itemsize)))
    return [memory.empty(shape, dtype).copy_(torch.randn(shape) / shape[1] ** 0.5) for _ in range(count)]


@dataclass(frozen=True)
class Linear(Case):
    """One layer with one number of rows."""

    layer: str
    num_rows: int
    dtype: torch.dtype
    columns = """
        case   | torch             | ours            | ratio        | GB/s         | of read  | of GEMM  | used
        {case} | {theirs!m:.3f} ms | {ours!m:.3f} ms | {ratio:.2f}x | {read!G:.1f} | {share:.0%} | {flops:.0%} | {used}
    """

    def setup(self) -> Computing:
        held = weights(SHAPES[self.layer], self.dtype)
        torch.manual_seed(self.num_rows)
        x, bias = torch.randn(self.num_rows, SHAPES[self.layer][1]).to(self.dtype), None
        if self.layer != "head":
            bias = torch.randn(SHAPES[self.layer][0]).to(self.dtype)
        run = {"torch": functional.linear, "native": linear}
        return {name: partial(lambda product: [product(x, one, bias) for one in held], run[name]) for name in run}

    def run(self, made: Computing, repeats: int) -> list[Point]:
        times = alternate(made, 3 * repeats)
        held = weights(SHAPES[self.layer], self.dtype)
        median = {name: statistics.median(taken) / len(held) for name, taken in times.items()}
        bytes_read = held[0].nbytes
        flops = 2 * self.num_rows * held[0].numel()
        return [
            {
                "layer": self.layer,
                "rows": self.num_rows,
                "dtype": str(self.dtype),
                "seconds": {name: round(taken, 7) for name, taken in median.items()},
                "ratio": round(median_ratio(times["torch"], times["native"]), 3),
                "bytes/s": {name: round(bytes_read / taken) for name, taken in median.items()},
                "share of read rate": round(bytes_read / median["native"] / read_rate(), 3),
                "share of GEMM rate": round(flops / median["native"] / gemm_rate(self.dtype), 3),
                "used": self.num_rows <= max_rows(self.dtype),
            }
        ]

    def verify(self, made: Computing, points: list[Point]) -> None:
        """The native product is no further from float64 than twice torch's is."""
        found = {name: compute()[0] for name, compute in made.items()}
        held, (_, length) = weights(SHAPES[self.layer], self.dtype)[0], SHAPES[self.layer]
        torch.manual_seed(self.num_rows)
        x = torch.randn(self.num_rows, length).to(self.dtype)
        few = slice(0, 512)
        exact = functional.linear(x.double(), held[few].double())
        if self.layer != "head":
            exact += torch.randn(SHAPES[self.layer][0]).to(self.dtype)[few].double()
        errors = {name: float((y[:, few].double() - exact).norm() / exact.norm()) for name, y in found.items()}
        assert errors["native"] <= 2 * errors["torch"], errors

    def rows(self, points: list[Point]) -> Iterable[Mapping[str, Any]]:
        for point in points:
            yield {
                "theirs": point["seconds"]["torch"],
                "ours": point["seconds"]["native"],
                "ratio": point["ratio"],
                "read": point["bytes/s"]["native"],
                "share": point["share of read rate"],
                "flops": point["share of GEMM rate"],
                "used": "yes" if point["used"] else "no",
            }

    def missed(self, points: list[Point]) -> list[str]:
        return [
            f"{self.name}: {p['ratio']} times torch's speed, and used" for p in points if p["used"] and p["ratio"] < 1
        ]


def cases(settings: Settings, folder: Path) -> list[Case]:
    """Each layer with each number of rows, in bfloat16, and q in float32."""
    bf16, f32 = torch.bfloat16, torch.float32
    rates: dict[str, Callable[[], float]] = {"GB/s read": read_rate, "GFLOP/s in bfloat16": partial(gemm_rate, bf16)}
    return [
        Machine("machine", rates),
        *(Linear(f"{layer}, {rows} rows", layer, rows, bf16) for layer in SHAPES for rows in ROWS),
        *(Linear(f"q in float32, {rows} rows", "q", rows, f32) for rows in ROWS),
    ]


SETTINGS = Settings(repeats=5)

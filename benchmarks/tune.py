"""Which kernel computes when: linear layers and experts of gpt-oss-20b, natively and by torch, at each number of rows.

Prints this processor's part of the table in gptoss_opt/kernels/kernel_table.py. Between two reads of a weight a case
reads more than a cache holds, as a model does, but for the router, which is small.
"""

from __future__ import annotations

import functools
import statistics
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.case import Case, Point, Settings
from benchmarks.harness import alternate, gemm_rate, median_ratio, read_rate
from benchmarks.machine import Machine
from gptoss_opt.kernels import memory
from gptoss_opt.kernels.experts import DenseWeights, PackedWeights
from gptoss_opt.kernels.experts.impl.native import NATIVE, NATIVE_DENSE, torchs_product
from gptoss_opt.kernels.kernel_table import DENSE_EXPERTS, LINEARS, PACKED_EXPERTS, Ranges, kernel_for, measured
from gptoss_opt.kernels.linear import linear
from gptoss_opt.kernels.native import BFLOAT16, INSTRUCTION_SETS, library
from gptoss_opt.kernels.processor import processor

SHAPES = {
    "q_proj": (4096, 2880),
    "k_proj": (512, 2880),
    "o_proj": (2880, 4096),
    "router": (32, 2880),
    "lm_head": (201_088, 2880),
}
LIKE = {"v_proj": "k_proj"}
"""What is measured by another, of the same shape."""
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
EXPERT_ROWS = (1, 4, 16, 64, 256, 1024)
"""Rows of each expert."""
BYTES = 500e6
"""Of weights that are read one after the other, at least."""
NUM_EXPERTS, EXPERT_SHAPE = 8, (5760, 2880)
MARGIN = 1.02
"""The native product of linear layers has to be so many times as fast as torch's: times move by that much."""

Computing = dict[str, Callable[[], list[Tensor]]]


@dataclass(frozen=True)
class Product(Case):
    """One projection with one number of rows, natively and by torch."""

    projection: str
    num_rows: int
    dtype: torch.dtype
    columns = """
        case   | torch             | native          | ratio        | GB/s         | of read  | of GEMM  | used
        {case} | {theirs!m:.3f} ms | {ours!m:.3f} ms | {ratio:.2f}x | {read!G:.1f} | {share:.0%} | {flops:.0%} | {used}
    """

    @abstractmethod
    def size(self) -> tuple[int, int]:
        """The bytes of weights that a contender reads, and the operations that it does."""

    @abstractmethod
    def turns(self) -> int:
        """How often a contender computes it in a turn."""

    def run(self, made: Computing, repeats: int) -> list[Point]:
        times = alternate(made, 2 * repeats)
        median = {name: statistics.median(taken) / self.turns() for name, taken in times.items()}
        bytes_read, flops = self.size()
        return [
            {
                "projection": self.projection,
                "rows": self.num_rows,
                "dtype": str(self.dtype),
                "seconds": {name: round(taken, 7) for name, taken in median.items()},
                "ratio": round(median_ratio(times["torch"], times["native"]), 3),
                "bytes/s": {name: round(bytes_read / taken) for name, taken in median.items()},
                "share of read rate": round(bytes_read / median["native"] / read_rate(), 3),
                "share of GEMM rate": round(flops / median["native"] / gemm_rate(self.dtype), 3),
                "used": kernel_for(self.projection, self.dtype, self.num_rows),
            }
        ]

    def rows(self, points: list[Point]) -> Iterable[Mapping[str, Any]]:
        for point in points:
            yield {
                "theirs": point["seconds"]["torch"],
                "ours": point["seconds"]["native"],
                "ratio": point["ratio"],
                "read": point["bytes/s"]["native"],
                "share": point["share of read rate"],
                "flops": point["share of GEMM rate"],
                "used": point["used"],
            }

    def missed(self, points: list[Point]) -> list[str]:
        return [
            f"{self.name}: the native product is used, at {p['ratio']} times torch's speed"
            for p in points
            if p["used"] == "native" and p["ratio"] < 1
        ]


@functools.cache
def weights(projection: str, dtype: torch.dtype) -> list[Tensor]:
    """Random weights of one shape, more than a cache holds, on the pages that loaded weights have."""
    torch.manual_seed(0)
    shape = SHAPES[projection]
    count = max(1, min(200, round(BYTES / (shape[0] * shape[1] * dtype.itemsize))))
    return [memory.empty(shape, dtype).copy_(torch.randn(shape) / shape[1] ** 0.5) for _ in range(count)]


@dataclass(frozen=True)
class Linear(Product):
    """A linear layer."""

    def size(self) -> tuple[int, int]:
        weight = weights(self.projection, self.dtype)[0]
        return weight.nbytes, 2 * self.num_rows * weight.numel()

    def turns(self) -> int:
        return len(weights(self.projection, self.dtype))

    def inputs(self) -> tuple[Tensor, Tensor | None]:
        """Rows and the bias; the head has none."""
        num_out, length = SHAPES[self.projection]
        torch.manual_seed(self.num_rows)
        x, bias = torch.randn(self.num_rows, length).to(self.dtype), torch.randn(num_out).to(self.dtype)
        return x, None if self.projection == "lm_head" else bias

    def setup(self) -> Computing:
        held, (x, bias) = weights(self.projection, self.dtype), self.inputs()
        run = {"torch": functional.linear, "native": linear}
        return {name: partial(lambda product: [product(x, one, bias) for one in held], run[name]) for name in run}

    def verify(self, made: Computing, points: list[Point]) -> None:
        """The native product is no further from float64 than twice torch's is."""
        found = {name: compute()[0] for name, compute in made.items()}
        few, (x, bias) = slice(0, 512), self.inputs()
        exact = functional.linear(x.double(), weights(self.projection, self.dtype)[0][few].double())
        if bias is not None:
            exact += bias[few].double()
        errors = {name: float((y[:, few].double() - exact).norm() / exact.norm()) for name, y in found.items()}
        assert errors["native"] <= 2 * errors["torch"], errors


@functools.cache
def expert_weights(projection: str, dtype: torch.dtype) -> PackedWeights | DenseWeights:
    """Random weights of gate and up of some experts."""
    torch.manual_seed(0)
    (num_out, length), bias = EXPERT_SHAPE, torch.randn(NUM_EXPERTS, EXPERT_SHAPE[0]).to(dtype)
    if projection == DENSE_EXPERTS:
        weight = memory.empty((NUM_EXPERTS, length, num_out), dtype)
        return DenseWeights(weight.copy_(torch.randn(length, num_out) / length**0.5), bias)
    blocks = memory.empty((NUM_EXPERTS, num_out, length // 32, 16), torch.uint8).random_(0, 256)
    scales = memory.empty((NUM_EXPERTS, num_out, length // 32), torch.uint8).random_(117, 121)
    return PackedWeights(blocks, scales, bias)


@dataclass(frozen=True)
class Experts(Product):
    """Experts with as many rows each; torch multiplies one after the other, decoded where they are packed."""

    def size(self) -> tuple[int, int]:
        held = expert_weights(self.projection, self.dtype)
        values = NUM_EXPERTS * EXPERT_SHAPE[0] * EXPERT_SHAPE[1]
        return sum(tensor.nbytes for tensor in held.tensors if tensor is not None), 2 * self.num_rows * values

    def turns(self) -> int:
        return 1

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Rows, and where those of each expert end."""
        torch.manual_seed(self.num_rows)
        x = torch.randn(NUM_EXPERTS * self.num_rows, EXPERT_SHAPE[1]).to(self.dtype)
        return x, torch.arange(1, NUM_EXPERTS + 1, dtype=torch.int32) * self.num_rows

    def setup(self) -> Computing:
        held, (x, offsets) = expert_weights(self.projection, self.dtype), self.inputs()
        native = partial(
            (NATIVE if isinstance(held, PackedWeights) else NATIVE_DENSE).forward, instruction_set=library().best
        )
        run: dict[str, Callable[..., Tensor]] = {"torch": torchs_product, "native": native}
        return {name: partial(lambda product: [product(x, offsets, held)], run[name]) for name in run}

    def verify(self, made: Computing, points: list[Point]) -> None:
        """The native product is no further from float64 than twice torch's is, for the last expert."""
        held, (x, _) = expert_weights(self.projection, self.dtype), self.inputs()
        last = slice(-self.num_rows, None)
        assert held.bias is not None
        exact = x[last].double() @ held.expert(-1, x).double() + held.bias[-1].double()
        errors = {
            name: float((compute()[0][last].double() - exact).norm() / exact.norm()) for name, compute in made.items()
        }
        assert errors["native"] <= 2 * errors["torch"], errors


def linear_ranges(ratios: Mapping[int, float]) -> Ranges:
    """Which kernel for how many rows, by how many times as fast as torch's the native product was at some.

    The native one as long as it is faster at all fewer rows, and no further than was measured: torch gains on it.

    Example:
        >>> linear_ranges({1: 2.0, 8: 1.3, 16: 0.9, 32: 1.1})
        ((8, 'native'), (None, 'torch'))
    """
    faster = list(takewhile(lambda rows: ratios[rows] >= MARGIN, sorted(ratios)))
    return ((faster[-1], "native"), (None, "torch")) if faster else ((None, "torch"),)


def expert_ranges(ratios: Mapping[int, float]) -> Ranges:
    """As `linear_ranges`, for experts: torch's from where it is faster at all larger numbers of rows, if it ever is.

    Example:
        >>> expert_ranges({1: 2.0, 8: 1.3, 64: 0.9}), expert_ranges({1: 2.0, 8: 0.99, 64: 1.2})
        (((8, 'native'), (None, 'torch')), ((None, 'native'),))
    """
    slower = list(takewhile(lambda rows: ratios[rows] < 1, sorted(ratios, reverse=True)))
    native = [rows for rows in sorted(ratios) if rows not in slower]
    if not slower:
        return ((None, "native"),)
    return ((native[-1], "native"), (None, "torch")) if native else ((None, "torch"),)


def conclude(points: Sequence[Point]) -> str:
    """This processor's part of the table in kernel_table.py, and whether it is what is there."""
    ratios: dict[tuple[str, str], dict[int, float]] = {}
    for point in points:
        if "projection" in point:
            ratios.setdefault((point["projection"], point["dtype"]), {})[point["rows"]] = point["ratio"]
    found: dict[tuple[str, str], Ranges] = {}
    for dtype in sorted({dtype for _, dtype in ratios}):
        for projection in (*LINEARS, PACKED_EXPERTS, DENSE_EXPERTS):
            if each := ratios.get((LIKE.get(projection, projection), dtype)):
                ranges = linear_ranges(each) if projection in LINEARS else expert_ranges(each)
                found[projection, dtype] = ranges
    there = {(name, str(dtype)): ranges for (name, dtype), ranges in measured().items()}
    lines = [
        f"        ({name!r}, {dtype.removeprefix('torch.')}): {ranges}," for (name, dtype), ranges in found.items()
    ]
    key = f"    ({processor()!r}, {INSTRUCTION_SETS[library().best]!r}): {{"
    verdict = "as it is checked in" if there == found else "which is not what is checked in"
    heading = f"For TABLE in gptoss_opt/kernels/kernel_table.py, {verdict}:"
    return "\n".join([heading, *(line.replace("'", '"') for line in (key, *lines, "    },"))])


def cases(settings: Settings, folder: Path) -> list[Case]:
    """Each projection with each number of rows."""
    bf16, f32 = torch.bfloat16, torch.float32
    rates: dict[str, Callable[[], float]] = {"GB/s read": read_rate, "GFLOP/s in bfloat16": partial(gemm_rate, bf16)}
    names = {bf16: "bfloat16", f32: "float32"}
    kinds = [(PACKED_EXPERTS, bf16), (PACKED_EXPERTS, f32)]
    if library().best >= BFLOAT16:
        kinds.append((DENSE_EXPERTS, bf16))
    return [
        Machine("machine", rates),
        *(
            Linear(f"{name} in {names[dtype]}, {rows} rows", name, rows, dtype)
            for dtype in names
            for name in SHAPES
            for rows in ROWS
        ),
        *(
            Experts(f"{kind} in {names[dtype]}, {rows} rows each", kind, rows, dtype)
            for kind, dtype in kinds
            for rows in EXPERT_ROWS
        ),
    ]


SETTINGS = Settings(repeats=5)

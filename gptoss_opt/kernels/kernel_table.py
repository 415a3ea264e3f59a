"""Which kernel computes a product on a CPU: the native one or torch's, by projection, dtype and number of rows.

`TABLE` is what `python -m benchmarks tune` found on the processors that it names. On any other all stay torch's, as
nothing shows that anything else is faster, but for packed experts, which torch has to decode first.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import bfloat16, float32

from .native import INSTRUCTION_SETS, library
from .processor import processor

Kernel = Literal["native", "torch"]
Ranges = tuple[tuple[int | None, Kernel], ...]
"""Kernels, each up to a number of rows; None stands for any number. Rows of experts are those of one, on average."""

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "router", "lm_head")
PACKED_EXPERTS, DENSE_EXPERTS = "packed experts", "dense experts"

TABLE: dict[tuple[str, str], dict[tuple[str, torch.dtype], Ranges]] = {
    ("Zen 4", "AVX-512 BF16"): {  # of linear layers nothing was measured; of experts `python -m benchmarks experts`
        ("packed experts", bfloat16): ((None, "native"),),
        ("dense experts", bfloat16): ((None, "native"),),
    },
    ("Zen 5", "AVX-512 BF16"): {  # of two runs, in which the machine read 49 and 82 GB/s, the smaller numbers
        ("q_proj", bfloat16): ((16, "native"), (None, "torch")),
        ("k_proj", bfloat16): ((16, "native"), (None, "torch")),
        ("v_proj", bfloat16): ((16, "native"), (None, "torch")),
        ("o_proj", bfloat16): ((12, "native"), (None, "torch")),
        ("router", bfloat16): ((64, "native"), (None, "torch")),
        ("lm_head", bfloat16): ((24, "native"), (None, "torch")),
        ("q_proj", float32): ((64, "native"), (None, "torch")),
        ("k_proj", float32): ((64, "native"), (None, "torch")),
        ("v_proj", float32): ((64, "native"), (None, "torch")),
        ("o_proj", float32): ((64, "native"), (None, "torch")),
        ("router", float32): ((64, "native"), (None, "torch")),
        ("lm_head", float32): ((64, "native"), (None, "torch")),
        ("packed experts", bfloat16): ((None, "native"),),
        ("packed experts", float32): ((None, "native"),),
        ("dense experts", bfloat16): ((None, "native"),),
    },
}
"""By processor and instruction set, then by projection and dtype."""


def measured() -> dict[tuple[str, torch.dtype], Ranges]:
    """What was measured on this processor, with the instruction set that the library uses here."""
    return TABLE.get((processor(), INSTRUCTION_SETS[library().best]), {})


def ranges(projection: str, dtype: torch.dtype) -> Ranges:
    """Which kernel computes a projection here, from few rows to many; the native library is there.

    Example:
        >>> ranges("packed experts", torch.bfloat16)[0][1]
        'native'
    """
    unmeasured: Ranges = ((None, "native" if projection == PACKED_EXPERTS else "torch"),)
    return measured().get((projection, dtype), unmeasured)


def kernel_for(projection: str, dtype: torch.dtype, rows: float) -> Kernel:
    """The kernel for so many rows."""
    return next(kernel for most, kernel in ranges(projection, dtype) if most is None or rows <= most)


def is_ever_native(projection: str, dtype: torch.dtype) -> bool:
    """Whether the native product is used for this projection here, for any number of rows."""
    return any(kernel == "native" for _, kernel in ranges(projection, dtype))


def described(projection: str, dtype: torch.dtype) -> str:
    """The row of the table that applies, in words.

    Example:
        >>> described("another layer", torch.bfloat16).split(" (")[0]
        'torch for any number of rows'
    """
    *first, (_, last) = ranges(projection, dtype)
    parts = [f"{kernel} up to {most} rows" for most, kernel in first]
    parts.append(f"{last} for {'more' if first else 'any number of rows'}")
    known = "" if (projection, dtype) in measured() else "not measured on "
    return f"{', '.join(parts)} ({known}{processor()}, {INSTRUCTION_SETS[library().best]}, {dtype})"

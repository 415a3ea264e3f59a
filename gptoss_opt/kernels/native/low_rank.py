"""Low-rank products of grouped rows by the native library, on CPUs; factors and sums in float32.

Legend: E experts, N rows sorted by expert, r the rank, L the length of a row.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum

import torch
from torch import Tensor

from ..gate import admit
from . import DTYPES, LowRankArguments, check_memory, library, why_not

LANES = 16


class _Kind(IntEnum):
    """Which product: see native.c."""

    IN = 0
    OUT = 1
    SUMS = 2


def serves(x: Tensor, *lengths: int) -> bool:
    """Whether the library takes rows such as `x`, and factors of these lengths."""
    return x.dtype in DTYPES and not any(n % LANES for n in lengths) and why_not(x.device.type, x.dtype) is None


def to_rank(rows: Tensor, offsets: Tensor, factor: Tensor, *, instruction_set: int | None = None) -> Tensor:
    """`rows` [N, L] times the factor [E, r, L] of each row's expert: float32 [N, r], zeros for rows of none."""
    hidden = rows.new_zeros((len(rows), factor.shape[1]), dtype=torch.float32)
    _call(_Kind.IN, rows, offsets, hidden, factor, None, instruction_set)
    return hidden


def add_from_rank(
    rows: Tensor, offsets: Tensor, hidden: Tensor, factor: Tensor, *, instruction_set: int | None = None
) -> None:
    """Add `hidden` [N, r] times the factor [E, r, L] of each row's expert to the contiguous `rows` [N, L]."""
    _call(_Kind.OUT, rows, offsets, hidden, factor, None, instruction_set)


def sums_over_rows(
    hidden: Tensor, rows: Tensor, offsets: Tensor, num_experts: int, *, instruction_set: int | None = None
) -> Tensor:
    """The sums float32 [E, r, L] over each expert's rows of `hidden` [N, r] times `rows` [N, L]."""
    sums = hidden.new_empty(num_experts, hidden.shape[1], rows.shape[1])
    _call(_Kind.SUMS, rows, offsets, hidden, None, sums, instruction_set)
    return sums


def add_gradients(
    d_y: Tensor,
    d_x: Tensor | None,
    offsets: Tensor,
    factors: tuple[Tensor, Tensor],
    x: Tensor,
    hidden: Tensor,
    *,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `add_from_rank(y, ..., to_rank(x, ..., A), B)`: of the factors, and added to that of `x`.

    Args:
        d_y: the contiguous gradient of `y`, `[N, out]`.
        d_x: the contiguous gradient of `x`, `[N, in]`, to add to; None if it is not wanted.
        offsets: where the rows of each expert end.
        factors: A `[E, r, in]` and B `[E, r, out]`.
        x: `[N, in]`; read only if a gradient of a factor is wanted.
        hidden: `x` through A, `[N, r]`; likewise.
        wanted: whether the gradients of A and of B are.
    """
    a, b = factors
    d_hidden = to_rank(d_y, offsets, b)
    if d_x is not None:
        add_from_rank(d_x, offsets, d_hidden, a)
    d_a = sums_over_rows(d_hidden, x, offsets, len(a)) if wanted[0] else None
    d_b = sums_over_rows(hidden, d_y, offsets, len(b)) if wanted[1] else None
    return d_a, d_b


def _call(
    kind: _Kind,
    rows: Tensor,
    offsets: Tensor,
    hidden: Tensor,
    factor: Tensor | None,
    sums: Tensor | None,
    instruction_set: int | None,
) -> None:
    functions, best, parallel = library()
    (num_rows, length), rank = rows.shape, hidden.shape[1]
    num_experts = len(offsets)
    rows = admit("rows", rows, rows.dtype, rows.shape, strided=kind != _Kind.OUT)
    offsets = admit("offsets", offsets, torch.int32, (num_experts,))
    hidden = admit("hidden", hidden, torch.float32, (num_rows, rank), strided=kind != _Kind.IN)
    if factor is not None:
        factor = admit("factor", factor, torch.float32, (num_experts, rank, length))
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (factor, hidden, rows, sums)]
    arguments = LowRankArguments(
        offsets.data_ptr(), num_experts, rank, length, *addresses, rows.dtype == torch.bfloat16
    )
    which = best if instruction_set is None else instruction_set
    status = functions.gptoss_low_rank(which, kind, ctypes.byref(arguments), parallel, torch.get_num_threads())
    check_memory(status)

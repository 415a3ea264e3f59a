"""Attention on pages by the native library: one call per layer for all decoding sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import native

if TYPE_CHECKING:
    from .paged import Paged

LANES = 16


def why_not(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """The reason why the native library cannot serve, or None."""
    if reason := native.why_not(device_type, dtype):
        return reason
    return f"needs a head_dim that is a multiple of {LANES}, not {head_dim}" if head_dim % LANES else None


def decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    sinks: Tensor,
    paged: Paged,
    scale: float,
    window: int | None,
    *,
    instruction_set: int | None = None,
) -> Tensor:
    """See `paged.decode`; in float32 inside."""
    functions, best, parallel = native.library()
    num_rows, num_heads, dim = q.shape
    assert q.dtype == keys.dtype == values.dtype
    q, sinks = q.contiguous(), sinks.to(torch.float32).contiguous()
    tables, firsts, lengths = (x.contiguous() for x in (paged.tables, paged.firsts, paged.lengths))
    assert all(x.dtype == torch.int32 for x in (tables, firsts, lengths))
    assert keys.is_contiguous()
    assert values.is_contiguous()
    out = torch.empty_like(q)
    request = native.Paged(
        *(x.data_ptr() for x in (q, keys, values, sinks, tables, firsts, lengths, out)),
        num_heads,
        keys.shape[1],
        dim,
        tables.shape[1],
        keys.shape[2],
        window or 0,
        scale,
        q.dtype == torch.bfloat16,
    )
    status = functions.gptoss_paged_attention(
        best if instruction_set is None else instruction_set, request, num_rows, parallel, torch.get_num_threads()
    )
    if status:
        raise MemoryError("the native kernel found no memory for its scratch space.")
    return out

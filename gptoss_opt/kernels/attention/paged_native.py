"""Attention on pages by the native library: one call per layer for all queries, of prompts as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import native

if TYPE_CHECKING:
    from .paged import Paged

LANES = 16
ROWS = 32
"""Query heads that share keys, about: as many as stay in the first-level cache with what they sum up."""


def why_not(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """The reason why the native library cannot serve, or None."""
    if reason := native.why_not(device_type, dtype):
        return reason
    return f"needs a head_dim that is a multiple of {LANES}, not {head_dim}" if head_dim % LANES else None


def attend(
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
    """All queries [T, H, D], whose keys are stored already: [T, H, D]. In float32 inside."""
    functions, best, parallel = native.library()
    _, num_heads, dim = q.shape
    num_kv_heads, page_size = keys.shape[1:3]
    assert q.dtype == keys.dtype == values.dtype
    assert keys.is_contiguous()
    assert values.is_contiguous()
    q, sinks = q.contiguous(), sinks.to(torch.float32).contiguous()
    tables, firsts = paged.tables.contiguous(), paged.firsts.contiguous()
    blocks, most = _blocks(paged, max(1, ROWS * num_kv_heads // num_heads))
    assert all(x.dtype == torch.int32 for x in (tables, firsts, blocks))
    out = torch.empty_like(q)
    request = native.Paged(
        *(x.data_ptr() for x in (q, keys, values, sinks, tables, firsts, blocks, out)),
        num_heads,
        num_kv_heads,
        dim,
        tables.shape[1],
        page_size,
        window or 0,
        most * (num_heads // num_kv_heads),
        scale,
        q.dtype == torch.bfloat16,
    )
    status = functions.gptoss_paged_attention(
        best if instruction_set is None else instruction_set, request, len(blocks), parallel, torch.get_num_threads()
    )
    if status:
        raise MemoryError("the native kernel found no memory for its scratch space.")
    return out


def _blocks(paged: Paged, most: int) -> tuple[Tensor, int]:
    """Units of work [B, 4]: the sequence, its first query, how many, and which token that is; and how many at most."""
    num_decoding = len(paged.tables) - len(paged.chunks)
    one = torch.arange(num_decoding, dtype=torch.int32)
    decoding = torch.stack([one, one, torch.ones_like(one), paged.lengths[:num_decoding] - 1], -1)
    chunks = [
        (number, query, min(most, end - query), length - (end - query))
        for number, (begin, end, length, _) in enumerate(paged.chunks, num_decoding)
        for query in range(begin, end, most)
    ]
    if not chunks:
        return decoding, 1
    # Long ones first: no thread is left alone with one of them at the end.
    return torch.cat([torch.tensor(chunks[::-1], dtype=torch.int32), decoding]), most

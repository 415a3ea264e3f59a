"""Attention on pages by the native library: one call per layer for all queries, of prompts as well."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import native
from ...gate import admit
from ..paged import Blocks, Chunk, Paged

ROWS = 32
"""About how many rows (a query head of one query each) a unit of work has: as many as stay in the first-level cache."""


def blocks_of(context_lens: Tensor, chunks: Sequence[Chunk], group_size: int) -> Blocks:
    """The units of work of a step. Each is consecutive queries of one sequence, for one key head and its group."""
    num_decoding, max_queries = len(context_lens) - len(chunks), max(1, ROWS // group_size)
    row = torch.arange(num_decoding, dtype=torch.int32)
    decoding = torch.stack([row, row, torch.ones_like(row), context_lens[:num_decoding] - 1], -1)
    if not chunks:
        return Blocks(decoding, 1)
    units = [
        (number, query, min(max_queries, end - query), length - (end - query))
        for number, (begin, end, length, _) in enumerate(chunks, num_decoding)
        for query in range(begin, end, max_queries)
    ]
    # Long ones first: no thread is left alone with one of them at the end.
    return Blocks(torch.cat([torch.tensor(units[::-1], dtype=torch.int32), decoding]), max_queries)


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
    """Attention of all queries [T, H, D], whose keys are stored already, to [T, H, D]. In float32 inside."""
    functions, best, parallel = native.library()
    _, num_heads, dim = q.shape
    num_kv_heads, page_size = keys.shape[1:3]
    assert paged.blocks is not None, "the native backend needs what blocks_for gives"
    blocks, max_queries = paged.blocks
    num_rows, width = paged.block_table.shape
    q = admit("queries", q, q.dtype, q.shape)
    tensors = (
        q,
        admit("keys", keys, q.dtype, (len(keys), num_kv_heads, page_size, dim), strided=False),
        admit("values", values, q.dtype, keys.shape, strided=False),
        admit("sinks", sinks.to(torch.float32), torch.float32, (num_heads,)),
        admit("block_table", paged.block_table, torch.int32, (num_rows, width)),
        admit("context_starts", paged.context_starts, torch.int32, (num_rows,)),
        admit("blocks", blocks, torch.int32, (len(blocks), 4)),
        out := torch.empty_like(q),
    )
    arguments = native.PagedArguments(
        *map(Tensor.data_ptr, tensors),
        None,
        num_heads,
        num_kv_heads,
        dim,
        width,
        page_size,
        window or 0,
        max_queries * (num_heads // num_kv_heads),
        scale,
        q.dtype == torch.bfloat16,
    )
    which = best if instruction_set is None else instruction_set
    native.check_memory(
        functions.gptoss_paged_attention(which, arguments, len(blocks), parallel, torch.get_num_threads())
    )
    return out

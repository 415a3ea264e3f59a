"""Attention of packed queries whose keys and values lie in pages: decoding sequences, then chunks of prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention import attention
from ..native import why_no_attention
from .impl import native, triton
from .impl.torch import decode as torch_decode
from .paged import Blocks, Chunk, Paged

BACKENDS = {"native": native.attend, "triton": triton.decode, "torch": torch_decode}
"""In order of preference. "native" serves all queries in one call; the others serve those that decode."""


def choose_backend(device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    """The first of `BACKENDS` that can serve.

    Example:
        >>> choose_backend("cpu", torch.float64, 64)
        'torch'
    """
    reasons = {"native": why_no_attention(device_type, dtype, head_dim), "triton": triton.why_not(device_type, dtype)}
    return next(name for name in BACKENDS if reasons.get(name) is None)


def blocks_for(backend: str, context_lens: Tensor, chunks: Sequence[Chunk], group_size: int) -> Blocks | None:
    """What a backend works out once for all layers of a step, for `Paged.blocks`; `group_size` heads share a key."""
    return native.blocks_of(context_lens, chunks, group_size) if backend == "native" else None


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    *,
    paged: Paged,
    layer: int,
    scale: float,
    window: int | None = None,
    backend: str = "torch",
) -> Tensor:
    """Attention with sinks of packed queries whose keys and values lie in pages; it stores the new ones there first.

    No gradients. Nothing is padded: the queries of all sequences lie end to end.

    Args:
        q: [1, num_heads, T, head_dim].
        k: [1, num_kv_heads, T, head_dim]; v likewise.
        sinks: [num_heads].
        paged: which keys each query sees.
        layer: the number of the layer, whose pages are used.
        scale: what the logits are multiplied with.
        window: how many keys a query sees, itself included; None sees all.
        backend: the name of one of `attention.BACKENDS`, for chunks where `paged.backend` does not serve them.

    Returns:
        [1, T, num_heads, head_dim], in q's dtype.

    Raises:
        ValueError: the new keys have another dtype than the pages.
    """
    queries = q[0].transpose(0, 1)
    paged.store(layer, k[0].transpose(0, 1), v[0].transpose(0, 1))
    keys, values, function = paged.keys[layer], paged.values[layer], BACKENDS[paged.backend]
    if paged.backend == "native" or not paged.chunks:
        return function(queries, keys, values, sinks, paged, scale, window)[None]
    num_decoding = paged.chunks[0].begin
    parts = []
    if num_decoding:
        parts.append(function(queries[:num_decoding], keys, values, sinks, paged.decoding, scale, window))
    for number, chunk in enumerate(paged.chunks):
        rows = slice(chunk.begin, chunk.end)
        seen_k, seen_v = k[:, :, rows], v[:, :, rows]
        if chunk.length > chunk.end - chunk.begin:
            seen_k, seen_v = paged.seen_by(number, keys, window)[None], paged.seen_by(number, values, window)[None]
        out = attention(q[:, :, rows], seen_k, seen_v, sinks, scale=scale, window=window, backend=backend)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)[None]

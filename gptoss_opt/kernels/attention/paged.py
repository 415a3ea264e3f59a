"""Attention of packed queries whose keys and values lie in pages: decoding sequences, then chunks of prompts.

The keys and values of a layer are two tensors of pages, [num_pages, N, page_size, D]. A sequence has a table of pages:
its token number p lies in page `table[p // page_size]`, at place `p % page_size`. Page 0 belongs to nobody: what is to
be kept nowhere goes there.

Shapes: T packed tokens of R sequences, H query heads, N key/value heads, D head dim, S keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import paged_native, paged_triton


class Chunk(NamedTuple):
    """Several tokens of one sequence: queries `begin..end` of the packed ones.

    Attributes:
        length: how many tokens the sequence has, these included.
        first: the first of them whose key there is.
    """

    begin: int
    end: int
    length: int
    first: int


class Paged(NamedTuple):
    """Which keys each of the packed queries sees, for all layers of one kind. Stands where a mask would.

    Attributes:
        keys, values: by layer, [num_pages, N, page_size, D].
        pages, places: int64 [T], where the keys and values of the packed tokens go.
        tables: int32 [R, width], the pages of the sequences: of those that decode (a query each), then of the chunks.
        firsts: int32 [R], the first of their tokens whose key there is.
        lengths: int32 [R], how many tokens they have, the new ones included.
        chunks: what comes after the decoding ones.
        backend: "native" (one call of the native library, on CPUs), "triton" (decoding, on CUDA) or "torch".
    """

    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    pages: Tensor
    places: Tensor
    tables: Tensor
    firsts: Tensor
    lengths: Tensor
    chunks: tuple[Chunk, ...]
    backend: str

    @property
    def decoding(self) -> Paged:
        """The decoding sequences alone."""
        num_rows = len(self.tables) - len(self.chunks)
        tables, firsts, lengths = (x[:num_rows] for x in (self.tables, self.firsts, self.lengths))
        return self._replace(tables=tables, firsts=firsts, lengths=lengths, chunks=())

    def seen_by(self, number: int, x: Tensor, window: int | None) -> Tensor:
        """Of the keys or values of a layer, those [N, S, D] that a chunk sees."""
        chunk, size = self.chunks[number], x.shape[2]
        begin = max(chunk.first, 0 if window is None else chunk.length - (chunk.end - chunk.begin) - window + 1)
        table = self.tables[len(self.tables) - len(self.chunks) + number, begin // size : -(-chunk.length // size)]
        pages = x.transpose(0, 1)[:, table.long()].flatten(1, 2)
        return pages[:, begin % size : begin % size + chunk.length - begin]


def choose_backend(device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    """The best backend there is."""
    if paged_native.why_not(device_type, dtype, head_dim) is None:
        return "native"
    return "torch" if paged_triton.why_not(device_type, dtype) else "triton"


def store(paged: Paged, layer: int, k: Tensor, v: Tensor) -> None:
    """Put the keys and values [T, N, D] of the packed tokens where they go."""
    if k.dtype != paged.keys[layer].dtype:
        raise ValueError(f"the pages hold {paged.keys[layer].dtype}, and the new keys are {k.dtype}: cast meanwhile.")
    where = paged.pages, paged.places
    paged.keys[layer].transpose(1, 2).index_put_(where, k)
    paged.values[layer].transpose(1, 2).index_put_(where, v)


def decode(q: Tensor, sinks: Tensor, paged: Paged, layer: int, scale: float, window: int | None) -> Tensor:
    """The queries [R, H, D] of decoding sequences, whose keys are stored already: [R, H, D]. Not by "native"."""
    function = paged_triton.decode if paged.backend == "triton" else torch_decode
    return function(q, paged.keys[layer], paged.values[layer], sinks, paged, scale, window)


def torch_decode(
    q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor, paged: Paged, scale: float, window: int | None
) -> Tensor:
    """`decode` in plain operations, on any device: every sequence is given as many keys as the table is wide."""
    num_rows, num_heads, dim = q.shape
    num_kv_heads = keys.shape[1]
    place = torch.arange(paged.tables.shape[1] * keys.shape[2], device=q.device)
    oldest = paged.firsts if window is None else torch.maximum(paged.firsts, paged.lengths - window)
    seen = (place >= oldest[:, None]) & (place < paged.lengths[:, None])
    k, v = (x[paged.tables.long()].transpose(1, 2).flatten(2, 3) for x in (keys, values))
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = (q.view(num_rows, num_kv_heads, -1, dim) @ k.mT).to(wide).mul_(scale)
    logits.masked_fill_(~seen[:, None, None], -torch.inf)
    sink = sinks.to(wide).view(1, num_kv_heads, -1, 1)
    largest = torch.maximum(logits.amax(-1, keepdim=True), sink)
    weights = logits.sub_(largest).exp_()
    weights.div_(weights.sum(-1, keepdim=True) + (sink - largest).exp())
    # A slot that is not seen may hold anything, and zero times that need not be zero.
    v = v.masked_fill(~seen[:, None, :, None], 0)
    return (weights.to(v.dtype) @ v).reshape(num_rows, num_heads, dim)

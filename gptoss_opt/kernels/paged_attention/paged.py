"""The data of attention on pages: where the keys and values of each packed query lie.

The keys and values of a layer are two tensors of pages, [num_pages, N, page_size, D]. Token number p of a sequence lies
in page `block_table[row, p // page_size]`, at place `p % page_size`. Page 0 belongs to nobody: what is to be kept
nowhere goes there.

Shapes: T packed tokens of R sequences, H query heads, N key/value heads, D head dim, S keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Chunk(NamedTuple):
    """Several tokens of one sequence: the packed queries from `begin` up to `end`.

    Attributes:
        length: how many tokens the sequence has, these included.
        first: the first token of the sequence whose key is in the pages.
    """

    begin: int
    end: int
    length: int
    first: int


class Blocks(NamedTuple):
    """The units of work of the native backend, which are the same in all layers of a step.

    Attributes:
        table: int32 [B, 4]: the row of a sequence, its first query, how many queries, and which token the first one is.
        max_queries: how many queries a unit has at most.
    """

    table: Tensor
    max_queries: int


class Paged(NamedTuple):
    """Which keys each of the packed queries sees, for all layers of one kind. Stands where a mask would.

    Attributes:
        keys, values: by layer, [num_pages, N, page_size, D].
        pages, places: int64 [T], where the keys and values of the packed tokens go.
        block_table: int32 [R, width], the pages of the sequences: first of those that decode (a query each), then of
            the chunks.
        context_starts: int32 [R], the first token of each sequence whose key is in the pages.
        context_lens: int32 [R], how many tokens each sequence has, the new ones included.
        chunks: the sequences that follow the decoding ones, and have several queries each.
        backend: the name of one of `paged_attention.BACKENDS`.
        blocks: what `paged_attention.blocks_for` gave; None where the backend needs none.
    """

    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    pages: Tensor
    places: Tensor
    block_table: Tensor
    context_starts: Tensor
    context_lens: Tensor
    chunks: tuple[Chunk, ...]
    backend: str
    blocks: Blocks | None = None

    @property
    def decoding(self) -> Paged:
        """The same without the chunks: the decoding sequences alone."""
        if not self.chunks:
            return self
        rows = slice(len(self.block_table) - len(self.chunks))
        return self._replace(
            block_table=self.block_table[rows],
            context_starts=self.context_starts[rows],
            context_lens=self.context_lens[rows],
            chunks=(),
        )

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Put the keys and values [T, N, D] of the packed tokens into the pages of a layer."""
        keys, where = self.keys[layer], (self.pages, self.places)
        if k.dtype != keys.dtype:
            raise ValueError(f"the pages hold {keys.dtype}, and the new keys are {k.dtype}: cast meanwhile.")
        keys.transpose(1, 2).index_put_(where, k)
        self.values[layer].transpose(1, 2).index_put_(where, v)

    def seen_by(self, number: int, x: Tensor, window: int | None) -> Tensor:
        """The keys (or values) [N, S, D] that chunk `number` sees, out of those of a layer, `x`."""
        chunk, size = self.chunks[number], x.shape[2]
        begin = max(chunk.first, 0 if window is None else chunk.length - (chunk.end - chunk.begin) - window + 1)
        row = len(self.block_table) - len(self.chunks) + number
        table = self.block_table[row, begin // size : -(-chunk.length // size)]
        pages = x.transpose(0, 1)[:, table.long()].flatten(1, 2)
        return pages[:, begin % size : begin % size + chunk.length - begin]

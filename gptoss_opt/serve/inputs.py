"""The pages on the device: keys, values and block tables, and a batch as the tensors of a forward that uses them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import memory
from ..kernels.paged_attention import Chunk, Paged, blocks_for, choose_backend
from ..model.serving import KeyShape
from .batch import Batch
from .cache import Cache
from .pages import NOWHERE


class Inputs(NamedTuple):
    """All that a forward takes.

    Attributes:
        tokens, positions: int64 [T].
        paged: by kind of layer, which keys the tokens see.
        last: int64 [S], the tokens after which logits are wanted.
    """

    tokens: Tensor
    positions: Tensor
    paged: dict[str, Paged]
    last: Tensor


class PagedMemory:
    """The keys and values of all pages, and the block tables of all sequences that run, on the device.

    Args:
        cache: says which pages there are, and which layers use them.
        shape: the shape of the keys of one token in one layer.
        num_rows: how many sequences run at once.
        max_tokens: how many tokens a sequence may have.
    """

    @torch.inference_mode(False)
    def __init__(self, cache: Cache, shape: KeyShape, *, num_rows: int, max_tokens: int) -> None:
        self.groups, self.page_size = groups, page_size = cache.groups, cache.page_size
        self.shape, self.num_rows, self.max_tokens = shape, num_rows, max_tokens
        width = -(-max_tokens // page_size)
        self.block_tables = torch.zeros(len(groups), num_rows, width, dtype=torch.int32, device=shape.device)
        # A page is of one group at a time, and holds the keys of all its layers: groups share the memory.
        size = (len(cache.pages.users), shape.num_heads, page_size, shape.head_dim)
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        for n in range(max(len(group.layers) for group in groups)):
            keys, values = (memory.empty(size, shape.dtype, shape.device) for _ in range(2))
            keys[NOWHERE], values[NOWHERE] = 0, 0  # rows of padding read it
            for layer in (group.layers[n] for group in groups if n < len(group.layers)):
                self.keys[layer], self.values[layer] = keys, values
        self.backend = choose_backend(shape.device.type, shape.dtype, shape.head_dim)

    def inputs(self, batch: Batch) -> Inputs:
        """A batch as tensors, sent to the device by one transfer; its new pages are put into the block tables first."""
        numbers: list[int] = []
        span_numbers: list[int] = []
        chunks: list[Chunk] = []
        for n, span in enumerate(batch.spans):
            begin, count = len(numbers), span.end - span.start
            numbers += range(span.start, span.end)
            span_numbers += [n] * count
            if count > 1:
                chunks.append(Chunk(begin, begin + count, span.end, span.first))
        columns = (batch.tokens, numbers, span_numbers, _flat(batch.spans), batch.last, _flat(batch.new_pages))
        device = self.block_tables.device
        packed = torch.tensor(_flat(columns), dtype=torch.int64, pin_memory=device.type == "cuda")
        parts = torch.split(packed.to(device, non_blocking=True), [*map(len, columns)])
        tokens, positions, span_of, spans, last, new_pages = parts
        rows, _, ends, firsts, write_from = spans.view(-1, 5).unbind(1)
        g, row, place, page = new_pages.view(-1, 4).unbind(1)
        self.block_tables[g, row, place] = page.int()
        token_rows, page_numbers, places = rows[span_of], positions // self.page_size, positions % self.page_size
        kept = positions >= write_from[span_of]
        width = -(-max([span.end for span in batch.spans]) // self.page_size)
        context_starts, context_lens = firsts.int(), ends.int()
        blocks = blocks_for(self.backend, context_lens, chunks, self.shape.group_size)
        paged = {}
        for group, tables in zip(self.groups, self.block_tables, strict=True):
            pages, block_table = tables[token_rows, page_numbers].long(), tables[rows, :width]
            starts, seen = context_starts, chunks
            if group.window is None:
                pages, starts = torch.where(kept, pages, NOWHERE), torch.zeros_like(starts)
                seen = [chunk._replace(first=0) for chunk in chunks]
            where = pages, places, block_table, starts, context_lens
            paged[group.kind] = Paged(self.keys, self.values, *where, tuple(seen), self.backend, blocks)
        return Inputs(tokens, positions, paged, last)


def _flat(rows: Iterable[Iterable[int]]) -> list[int]:
    return [*chain.from_iterable(rows)]

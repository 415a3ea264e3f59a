"""The pages on the device: keys, values and block tables, and a batch as the tensors of a forward that uses them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import memory
from ..kernels.paged_attention import Chunk, Paged, blocks_for, choose_backend
from ..model.serving import KeyShape
from .batch import Batch
from .cache import Group
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
        groups: the kinds of layers.
        shape: the shape of the keys of one token in one layer.
        num_pages: how many pages there are, for all groups together, page `NOWHERE` included.
        page_size: how many tokens share a page.
        num_rows: how many sequences run at once.
        max_tokens: how many tokens a sequence may have.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        groups: tuple[Group, ...],
        shape: KeyShape,
        *,
        num_pages: int,
        page_size: int,
        num_rows: int,
        max_tokens: int,
    ) -> None:
        self.groups, self.shape, self.page_size, self.num_rows = groups, shape, page_size, num_rows
        width = -(-max_tokens // page_size)
        self.block_tables = torch.zeros(len(groups), num_rows, width, dtype=torch.int32, device=shape.device)
        # A page is of one group at a time, and holds the keys of all its layers: groups share the memory.
        size = (num_pages, shape.num_heads, page_size, shape.head_dim)
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        for n in range(max(len(group.layers) for group in groups)):
            keys, values = (memory.empty(size, shape.dtype, shape.device) for _ in range(2))
            keys[NOWHERE], values[NOWHERE] = 0, 0  # rows of padding read it
            for layer in (group.layers[n] for group in groups if n < len(group.layers)):
                self.keys[layer], self.values[layer] = keys, values
        self.backend = choose_backend(shape.device.type, shape.dtype, shape.head_dim)

    def inputs(self, batch: Batch) -> Inputs:
        """A batch as tensors, sent to the device at once; its new pages are put into the block tables first."""
        positions: list[int] = []
        token_rows: list[int] = []
        write_from: list[int] = []
        chunks: list[Chunk] = []
        for span in batch.spans:
            begin, count = len(positions), span.end - span.start
            positions += range(span.start, span.end)
            token_rows += [span.row] * count
            write_from += [span.write_from] * count
            if count > 1:
                chunks.append(Chunk(begin, begin + count, span.end, span.first))
        rows, _, ends, firsts, _ = zip(*batch.spans, strict=True)
        sent = self._sent(
            tokens=batch.tokens,
            positions=positions,
            token_rows=token_rows,
            write_from=write_from,
            rows=rows,
            ends=ends,
            firsts=firsts,
            last=batch.last,
            new_pages=[*chain.from_iterable(batch.new_pages)],
        )
        group_numbers, new_rows, new_places, new_pages = sent["new_pages"].view(-1, 4).unbind(1)
        self.block_tables[group_numbers, new_rows, new_places] = new_pages.int()
        numbers, places = sent["positions"] // self.page_size, sent["positions"] % self.page_size
        context_starts, context_lens = sent["firsts"].int(), sent["ends"].int()
        width = -(-max(ends) // self.page_size)
        blocks = blocks_for(self.backend, context_lens, chunks, self.shape.group_size)
        paged = {}
        for tables, group in zip(self.block_tables, self.groups, strict=True):
            pages, starts, seen = tables[sent["token_rows"], numbers].long(), context_starts, chunks
            if group.window is None:
                pages = torch.where(sent["positions"] >= sent["write_from"], pages, NOWHERE)
                starts, seen = torch.zeros_like(starts), [chunk._replace(first=0) for chunk in chunks]
            paged[group.kind] = Paged(
                self.keys,
                self.values,
                pages,
                places,
                tables[sent["rows"], :width],
                starts,
                context_lens,
                tuple(seen),
                self.backend,
                blocks,
            )
        return Inputs(sent["tokens"], sent["positions"], paged, sent["last"])

    def free(self) -> None:
        """Give the memory of the pages back, also where somebody still holds what read them."""
        self.keys.clear()
        self.values.clear()

    def _sent(self, **columns: Sequence[int]) -> dict[str, Tensor]:
        """Lists of numbers as int64 tensors on the device, by one transfer."""
        device = self.block_tables.device
        flat = [*chain.from_iterable(columns.values())]
        numbers = torch.tensor(flat, dtype=torch.int64, pin_memory=device.type == "cuda")
        parts = torch.split(numbers.to(device, non_blocking=True), [*map(len, columns.values())])
        return dict(zip(columns, parts, strict=True))

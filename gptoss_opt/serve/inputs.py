"""A batch as tensors: the tables of pages, which stay on the device, and what a forward takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.attention import Chunk
from .batch import Batch
from .cache import Group
from .pages import NOWHERE


class Seen(NamedTuple):
    """What the layers of one group are told: see `Paged`."""

    pages: Tensor
    places: Tensor
    tables: Tensor
    firsts: Tensor
    lengths: Tensor
    chunks: tuple[Chunk, ...]


class Inputs(NamedTuple):
    """All that a forward takes: tokens and positions [T], after which of them logits are wanted [S], and what each
    group sees."""

    tokens: Tensor
    positions: Tensor
    last: Tensor
    seen: tuple[Seen, ...]


class Tables:
    """The pages of each sequence that runs, by group, on the device; steps tell only what is new.

    Args:
        groups: the kinds of layers.
        page_size: tokens of a page.
        num_rows: sequences that run at once.
        max_tokens: of a sequence.
        device: where the model is.
    """

    def __init__(
        self, groups: tuple[Group, ...], page_size: int, num_rows: int, max_tokens: int, device: torch.device
    ) -> None:
        self.groups, self.page_size, self.device = groups, page_size, device
        width = -(-max_tokens // page_size)
        self.pages = torch.zeros(len(groups), num_rows, width, dtype=torch.int32, device=device)

    def inputs(self, batch: Batch) -> Inputs:
        """A batch as tensors, sent to the device at once."""
        parts = batch.parts
        told = [(g, *new) for g, pages in enumerate(batch.pages) for new in pages]
        columns: dict[str, list[int]] = {
            "tokens": [token for part in parts for token in part.tokens],
            "positions": [n for part in parts for n in range(part.start, part.end)],
            "rows": [part.row for part in parts for _ in part.tokens],
            "kept": [n >= part.write_from for part in parts for n in range(part.start, part.end)],
            "parts": [part.row for part in parts],
            "firsts": [part.first for part in parts],
            "lengths": [part.end for part in parts],
            "last": list(batch.last),
            **{f"told{n}": [new[n] for new in told] for n in range(4)},
        }
        at = self._sent(columns)
        self.pages[at["told0"], at["told1"], at["told2"]] = at["told3"].int()
        width = max(-(-part.end // self.page_size) for part in parts)
        numbers, places = at["positions"] // self.page_size, at["positions"] % self.page_size
        seen = []
        for g, group in enumerate(self.groups):
            pages = self.pages[g, at["rows"], numbers].long()
            if group.window is None:
                pages = torch.where(at["kept"].bool(), pages, NOWHERE)
            firsts = at["firsts"] if group.window is not None else torch.zeros_like(at["firsts"])
            tables, chunks = self.pages[g, at["parts"], :width], _chunks(batch, group)
            seen.append(Seen(pages, places, tables, firsts.int(), at["lengths"].int(), chunks))
        return Inputs(at["tokens"], at["positions"], at["last"], tuple(seen))

    def _sent(self, columns: Mapping[str, list[int]]) -> dict[str, Tensor]:
        """Lists of numbers as int64 tensors on the device, by one transfer."""
        flat = [number for column in columns.values() for number in column]
        numbers = torch.tensor(flat, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        parts = torch.split(numbers.to(self.device, non_blocking=True), [*map(len, columns.values())])
        return dict(zip(columns, parts, strict=True))


def _chunks(batch: Batch, group: Group) -> tuple[Chunk, ...]:
    """The chunks of prompts, as a group of layers sees them."""
    chunks, begin = [], len(batch.decoding)
    for part in batch.chunks:
        end = begin + len(part.tokens)
        chunks.append(Chunk(begin, end, part.end, 0 if group.window is None else part.first))
        begin = end
    return tuple(chunks)

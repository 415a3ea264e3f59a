"""What a step computes, as plain numbers: how the scheduler's decisions reach the model, on this rank and on others."""

from __future__ import annotations

from collections.abc import Sequence as Works
from dataclasses import dataclass

from .scheduler import Work


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of one sequence.

    Attributes:
        row: of the sequence, in the tables.
        start: the number of the first of them.
        tokens: their ids.
        first: the first token whose keys sliding layers have.
        write_from: the first token whose keys full layers keep.
    """

    row: int
    start: int
    tokens: tuple[int, ...]
    first: int
    write_from: int

    @property
    def end(self) -> int:
        """One past the last."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Batch:
    """The tokens of one step, packed end to end.

    Attributes:
        decoding: sequences of which one token is computed: they come first.
        chunks: the others.
        last: of each of them, the last of the packed tokens: after these, logits are wanted.
        pages: by group, what is new in the tables: (row, place in the row, page).
    """

    decoding: tuple[Part, ...]
    chunks: tuple[Part, ...]
    last: tuple[int, ...]
    pages: tuple[tuple[tuple[int, int, int], ...], ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """All of them, in the order they are packed."""
        return self.decoding + self.chunks

    @classmethod
    def of(cls, works: Works[Work], num_groups: int) -> Batch:
        """What is to be done, the decoding sequences first. The tables' new pages are taken as told."""
        decoding: list[Part] = []
        chunks: list[Part] = []
        last: list[int] = []
        pages: list[list[tuple[int, int, int]]] = [[] for _ in range(num_groups)]
        num_tokens = 0
        for sequence, count in works:
            start, row = sequence.num_computed, sequence.row
            tokens = tuple(sequence.tokens[start : start + count])
            part = Part(row, start, tokens, sequence.first, sequence.write_from)
            (decoding if count == 1 else chunks).append(part)
            num_tokens += count
            last.append(num_tokens - 1)
            for new, table, told in zip(pages, sequence.tables, sequence.num_told, strict=True):
                new.extend((row, place, table[place]) for place in range(told, len(table)))
            sequence.num_told = [len(table) for table in sequence.tables]
        return cls(tuple(decoding), tuple(chunks), tuple(last), tuple(map(tuple, pages)))

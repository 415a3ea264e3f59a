"""What a step computes, as plain numbers: how the scheduler's decisions reach the model, on this rank and on others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .scheduler import Work


class Span(NamedTuple):
    """Consecutive tokens of one sequence.

    Attributes:
        row: the row of the sequence in the block tables.
        start, end: the tokens from number `start` up to `end`.
        first, write_from: as in `SequenceState`.
    """

    row: int
    start: int
    end: int
    first: int
    write_from: int


class Score(NamedTuple):
    """A token of a prompt whose log-probability is wanted.

    Attributes:
        place: the place among the packed tokens after which it stands.
        token: its id.
        num_likeliest: as in `Scored`.
    """

    place: int
    token: int
    num_likeliest: int


class Batch(NamedTuple):
    """The tokens of one step, packed end to end.

    Attributes:
        tokens: the ids.
        spans: which tokens of which sequence they are; those of one token (sequences that decode) come first.
        last: the places among the packed tokens after which logits are wanted: the last of each span.
        new_pages: what is new in the block tables: (group, row, place in the row, page).
        scores: the tokens of prompts whose log-probabilities are wanted, in the order of the packed tokens.
    """

    tokens: list[int]
    spans: list[Span]
    last: list[int]
    new_pages: list[tuple[int, int, int, int]]
    scores: list[Score]

    @classmethod
    def of(cls, works: Sequence[Work]) -> Batch:
        """The batch that computes `works`. From now on, the new pages of their sequences count as told."""
        batch = cls([], [], [], [], [])
        for sequence, count in works:
            start, end, row = sequence.num_computed, sequence.num_computed + count, sequence.row
            offset, scored = len(batch.tokens) - start, sequence.scored
            batch.scores.extend(
                Score(offset + n, scored.tokens[n - scored.start], scored.num_likeliest)
                for n in scored.within(start, end)
            )
            batch.tokens.extend(sequence.tokens[start:end])
            batch.spans.append(Span(row, start, end, sequence.first, sequence.write_from))
            batch.last.append(len(batch.tokens) - 1)
            for group, table in enumerate(sequence.block_tables):
                for place in range(sequence.num_told[group], len(table)):
                    batch.new_pages.append((group, row, place, table[place]))
                sequence.num_told[group] = len(table)
        return batch

"""The state of a sequence that is being generated: its tokens, how far it is computed, and its pages. No tensors."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

_numbers = count()


class Scored(NamedTuple):
    """The tokens of a prompt whose log-probabilities are wanted: its last ones.

    Attributes:
        start: the number of the token before the first of them: the logits after it are the first that are wanted.
        tokens: their ids.
        num_likeliest: of how many of the likeliest tokens in their places the log-probabilities are wanted, too.
    """

    start: int = sys.maxsize
    tokens: tuple[int, ...] = ()
    num_likeliest: int = 0

    def within(self, start: int, end: int) -> range:
        """The numbers of the tokens from `start` up to `end` after which logits are wanted."""
        return range(max(start, self.start), min(end, self.start + len(self.tokens)))


NOTHING_SCORED = Scored()


@dataclass(eq=False)
class SequenceState:
    """One completion of one prompt, as the scheduler, the cache and the step's batch see it.

    Attributes:
        tokens: the prompt, and what was generated so far.
        prompt_length: how many of the tokens are the prompt.
        scored: the tokens of the prompt whose log-probabilities are wanted.
        number: the order of arrival.
        row: its row in the block tables on the device; -1 unless it runs.
        num_computed: how many tokens have their keys and values computed.
        block_tables: by group of layers, the page of each `page_size` tokens; NOWHERE once no query sees them.
        first: the first token whose keys sliding layers have.
        write_from: the first token whose keys full layers keep; the pages before are shared, and known to be right.
        exact_from: the first token whose keys sliding layers have right.
        digests: a digest of all tokens up to the end of each page, for as many pages as were asked for.
        num_remembered: by group, how many pages from the start the prefix cache was told of.
        num_told: by group, how many pages the block tables on the device were told of.
    """

    tokens: list[int]
    prompt_length: int
    scored: Scored = NOTHING_SCORED
    number: int = field(default_factory=_numbers.__next__)
    row: int = -1
    num_computed: int = 0
    block_tables: list[list[int]] = field(default_factory=list[list[int]])
    first: int = 0
    write_from: int = 0
    exact_from: int = 0
    digests: list[bytes] = field(default_factory=list[bytes])
    num_remembered: list[int] = field(default_factory=list[int])
    num_told: list[int] = field(default_factory=list[int])

    @property
    def first_wanted(self) -> int:
        """The number of the first token after which logits are wanted: it and those behind it are always computed."""
        return min(self.scored.start, len(self.tokens) - 1)

    @property
    def remaining(self) -> int:
        """How many tokens are to be computed before another can be sampled."""
        return len(self.tokens) - self.num_computed

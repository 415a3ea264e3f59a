"""A sequence that is being generated: its tokens, how far it is computed, and the pages it has. No tensors."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from itertools import count

from .pages import NOWHERE

_numbers = count()


@dataclass(eq=False)
class Sequence:
    """One completion of one prompt.

    Attributes:
        tokens: the prompt, and what was generated so far.
        prompt_length: how many of them are the prompt.
        max_tokens: how many there are to be at most.
        number: the order of arrival.
        row: its row in the tables of the step's inputs, while it runs.
        num_computed: tokens whose keys and values are computed.
        tables: by group of layers, the page of each `page_size` tokens; NOWHERE once no query sees them.
        first: the first token whose keys sliding layers have.
        write_from: the first token whose keys full layers keep; the pages before are shared, and known to be right.
        exact_from: the first token whose keys sliding layers have right.
        digests: of the tokens up to the end of each page, as far as they were asked for.
        num_remembered: by group, how many pages from the start the prefix cache was told of.
        num_told: by group, how many the tables of the step's inputs were told of.
    """

    tokens: list[int]
    prompt_length: int
    max_tokens: int
    number: int = field(default_factory=_numbers.__next__)
    row: int = -1
    num_computed: int = 0
    tables: list[list[int]] = field(default_factory=list[list[int]])
    first: int = 0
    write_from: int = 0
    exact_from: int = 0
    digests: list[bytes] = field(default_factory=list[bytes])
    num_remembered: list[int] = field(default_factory=list[int])
    num_told: list[int] = field(default_factory=list[int])

    @classmethod
    def of(cls, prompt: Tokens[int], max_new_tokens: int) -> Sequence:
        """One that has only its prompt."""
        return cls(list(prompt), len(prompt), len(prompt) + max_new_tokens)

    @property
    def remaining(self) -> int:
        """Tokens to be computed before another can be sampled."""
        return len(self.tokens) - self.num_computed

    @property
    def generated(self) -> list[int]:
        """What was generated so far."""
        return self.tokens[self.prompt_length :]

    @property
    def pages(self) -> list[int]:
        """The pages it uses, of all groups."""
        return [page for table in self.tables for page in table if page != NOWHERE]

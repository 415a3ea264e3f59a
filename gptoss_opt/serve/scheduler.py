"""What is computed in each step: the policy. No tensors.

Sequences are served in the order they arrived. Decoding ones get their token first; what is left of the token budget
goes to prompts, in chunks, each of which leaves half of it to those behind, so that a short prompt never waits for a
long one to end. When pages run out the youngest sequence gives its pages back and is computed again later. The oldest
can always go on, so that all come to their end.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as Numbers
from dataclasses import dataclass, field
from typing import NamedTuple

from .cache import Cache, Prefix
from .sequence import Sequence


class Work(NamedTuple):
    """The next `num_tokens` of a sequence."""

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether a token is sampled after them."""
        return self.num_tokens == self.sequence.remaining


def shares(lengths: Numbers[int], budget: int) -> list[int]:
    """How many tokens each of several prompts gets, the oldest first.

    Each leaves half of the budget to those behind it, as far as they need it; what is left over goes to the oldest.

    Example:
        >>> shares([3000, 100, 3000], 1024)
        [512, 100, 412]
    """
    left, behind, given = budget, sum(lengths), []
    for length in lengths:
        behind -= length
        given.append(min(length, left - min(behind, left // 2)))
        left -= given[-1]
    for n, length in enumerate(lengths):
        more = min(length - given[n], left)
        given[n] += more
        left -= more
    return given


@dataclass
class Scheduler:
    """The sequences that wait and those that run, both in the order of arrival.

    Attributes:
        cache: the pages.
        max_num_sequences: how many run at once.
        max_batch_tokens: how many tokens a step computes.
        num_preemptions: how often a sequence had to give its pages back.
        most_pages_used: at any time.
        num_shared: tokens that were not computed, as another sequence had done so.
    """

    cache: Cache
    max_num_sequences: int
    max_batch_tokens: int
    waiting: list[Sequence] = field(default_factory=list[Sequence])
    running: list[Sequence] = field(default_factory=list[Sequence])
    num_preemptions: int = 0
    most_pages_used: int = 0
    num_shared: int = 0

    def __post_init__(self) -> None:
        self._rows = list(range(self.max_num_sequences))[::-1]

    def why_never(self, num_tokens: int) -> str | None:
        """The reason why a sequence of so many tokens can never be computed, or None."""
        # Of the last token no keys are needed.
        needed, there = self.cache.most_pages(num_tokens - 1), self.cache.pages.num_pages
        if needed <= there:
            return None
        return (
            f"{num_tokens} tokens need {needed} pages of {self.cache.page_size} tokens, and there are {there}. "
            "Give the batcher more kv_memory, or ask for fewer tokens."
        )

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        insort(self.waiting, sequence, key=_number)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, and take its pages back."""
        if sequence in self.running:
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Work]:
        """What to compute now, single tokens first; nothing only if there is nothing to do."""
        before, works = self.num_preemptions, []
        for sequence in [one for one in self.running if one.remaining == 1]:
            while sequence in self.running and not self.cache.fitting(sequence, 1):
                self._preempt(self.running[-1])
            if sequence in self.running:
                self.cache.grow(sequence, 1)
                works.append(Work(sequence, 1))
        served = {work.sequence for work in works}
        budget = self.max_batch_tokens - len(works)
        begun = [one for one in self.running if one not in served]
        fresh = self._next_to_begin(2 * budget)
        lengths = [*(one.remaining for one in begun), *fresh.values()]
        given = iter(shares(lengths, budget))
        for sequence, num_tokens in zip(begun, given, strict=False):
            if fits := self._let_grow(sequence, num_tokens, served):
                served.add(sequence)
                works.append(Work(sequence, fits))
        # Where pages have just run out nobody begins, and where there are none for one, none behind it does.
        for sequence, num_tokens in zip(fresh, given, strict=False) if self.num_preemptions == before else ():
            if not num_tokens:
                break
            prefix = self.cache.prefix_of(sequence)
            if prefix is None:  # one that began in this very step is about to compute it
                continue
            if not (fits := self._admit(sequence, prefix, num_tokens)):
                break
            works.append(Work(sequence, fits))
        # The last token of a prompt's chunk is one that decodes, to all that comes after.
        self.most_pages_used = max(self.most_pages_used, self.cache.pages.num_used)
        return sorted(works, key=_is_chunk)

    def clear(self) -> None:
        """Forget all sequences."""
        self.waiting.clear()
        for sequence in list(self.running):
            self._stop(sequence)

    def advance(self, work: Work) -> None:
        """It is computed."""
        self.cache.advance(*work)

    def _next_to_begin(self, num_tokens: int) -> dict[Sequence, int]:
        """Those that may begin next, about as many as have so many tokens, and how many each has to compute."""
        found: dict[Sequence, int] = {}
        # Those that wait for a prefix count as well, so that thousands of them need not be looked at.
        for sequence in self.waiting[: 2 * self.max_num_sequences]:
            if len(found) == len(self._rows) or sum(found.values()) >= num_tokens:
                break
            if (prefix := self.cache.prefix_of(sequence)) is not None:
                found[sequence] = len(sequence.tokens) - prefix.start
        return found

    def _let_grow(self, sequence: Sequence, num_tokens: int, served: set[Sequence]) -> int:
        """Give one as much as there are pages for, and if there are none, those of the youngest."""
        if not num_tokens or sequence not in self.running:
            return 0
        while not (fits := self.cache.fitting(sequence, num_tokens)):
            youngest = self.running[-1]
            if youngest is sequence or youngest in served:
                return 0
            self._preempt(youngest)
        self.cache.grow(sequence, fits)
        return fits

    def _admit(self, sequence: Sequence, prefix: Prefix, num_tokens: int) -> int:
        """Let one that waits begin with as much as there are pages for; if there are none, it goes on waiting."""
        self.cache.begin(sequence, prefix)
        # Those that run each need a page soon; to take the last one would only get it preempted.
        fits = self.cache.fitting(sequence, min(num_tokens, sequence.remaining), spare=len(self.running))
        if not fits:
            self.cache.release(sequence)
            return 0
        self.cache.grow(sequence, fits)
        self.waiting.remove(sequence)
        sequence.row = self._rows.pop()
        insort(self.running, sequence, key=_number)
        self.num_shared += prefix.start
        return fits

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        self.add(sequence)
        self.num_preemptions += 1

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._rows.append(sequence.row)
        sequence.row = -1
        self.cache.release(sequence)


def _number(sequence: Sequence) -> int:
    return sequence.number


def _is_chunk(work: Work) -> bool:
    return work.num_tokens > 1

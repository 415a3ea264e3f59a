"""What is computed in each step: the policy. No tensors.

Sequences are served in the order they arrived. Decoding ones get their token first; what is left of the token budget
goes to prompts, in chunks, each of which leaves half of it to those behind, so that a short prompt never waits for a
long one to end. When pages run out the youngest sequence gives its pages back and is computed again later. The oldest
can always go on, so that all come to their end.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from .cache import Cache, Prefix
from .sequence import SequenceState

_number = attrgetter("number")


class Work(NamedTuple):
    """The next `num_tokens` tokens of a sequence are computed; if those are all that remain, another is sampled."""

    sequence: SequenceState
    num_tokens: int


def shares(lengths: Sequence[int], budget: int) -> list[int]:
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
        max_num_sequences: how many sequences run at once.
        max_batch_tokens: how many tokens a step computes.
        num_preemptions: how often a sequence had to give its pages back.
        max_pages_used: how many pages were used at once, at the most.
        num_shared: how many tokens were not computed, as another sequence had done so.
    """

    cache: Cache
    max_num_sequences: int
    max_batch_tokens: int
    waiting: list[SequenceState] = field(default_factory=list[SequenceState])
    running: list[SequenceState] = field(default_factory=list[SequenceState])
    num_preemptions: int = 0
    max_pages_used: int = 0
    num_shared: int = 0

    def __post_init__(self) -> None:
        self._rows = list(range(self.max_num_sequences))[::-1]

    def why_never(self, num_tokens: int) -> str | None:
        """The reason why a sequence of so many tokens can never be computed, or None."""
        # The keys of the last token are not needed.
        needed, there = self.cache.max_pages(num_tokens - 1), self.cache.pages.num_pages
        if needed <= there:
            return None
        return (
            f"{num_tokens} tokens need {needed} pages of {self.cache.page_size} tokens, and there are {there}. "
            "Give the batcher more kv_memory, or ask for fewer tokens."
        )

    def add(self, sequence: SequenceState) -> None:
        """Let a sequence wait for its turn."""
        insort(self.waiting, sequence, key=_number)

    def remove(self, sequence: SequenceState) -> None:
        """Forget a sequence, and take its pages back."""
        if sequence in self.running:
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)

    def clear(self) -> None:
        """Forget all sequences."""
        self.waiting.clear()
        for sequence in list(self.running):
            self._stop(sequence)

    def schedule(self) -> list[Work]:
        """What to compute now, single tokens first; nothing only if there is nothing to do."""
        before, works = self.num_preemptions, []
        for sequence in [one for one in self.running if one.remaining == 1]:
            while sequence in self.running and not self.cache.grow(sequence, 1):
                self._preempt(self.running[-1])
            if sequence in self.running:
                works.append(Work(sequence, 1))
        served = {work.sequence for work in works}
        budget = self.max_batch_tokens - len(works)
        begun = [one for one in self.running if one not in served]
        fresh = self._next_to_begin(2 * budget)
        given = shares([*(one.remaining for one in begun), *fresh.values()], budget)
        for sequence, num_tokens in zip(begun, given, strict=False):
            if fits := self._let_grow(sequence, num_tokens, served):
                served.add(sequence)
                works.append(Work(sequence, fits))
        # Where pages have just run out nobody begins, and where there are none for one, none behind it does.
        may_begin = zip(fresh, given[len(begun) :], strict=True) if self.num_preemptions == before else ()
        for sequence, num_tokens in may_begin:
            if not num_tokens:
                break
            prefix = self.cache.prefix_of(sequence)
            if prefix is None:  # one that began in this very step is about to compute it
                continue
            if not (fits := self._admit(sequence, prefix, num_tokens)):
                break
            works.append(Work(sequence, fits))
        self.max_pages_used = max(self.max_pages_used, self.cache.pages.num_used)
        # The last token of a prompt's chunk is one that decodes, to all that comes after.
        return [one for one in works if one.num_tokens == 1] + [one for one in works if one.num_tokens > 1]

    def _next_to_begin(self, num_tokens: int) -> dict[SequenceState, int]:
        """The sequences that may begin next, and how many tokens each has to compute: about `num_tokens` in all."""
        found: dict[SequenceState, int] = {}
        # Those that wait for a prefix count as well, so that thousands of them need not be looked at.
        for sequence in self.waiting[: 2 * self.max_num_sequences]:
            if len(found) == len(self._rows) or sum(found.values()) >= num_tokens:
                break
            if (prefix := self.cache.prefix_of(sequence)) is not None:
                found[sequence] = len(sequence.tokens) - prefix.start
        return found

    def _let_grow(self, sequence: SequenceState, num_tokens: int, served: set[SequenceState]) -> int:
        """Give a sequence that runs pages for its next tokens, and if there are none, those of the youngest.

        Returns how many of the tokens have pages now.
        """
        if not num_tokens or sequence not in self.running:
            return 0
        while not (fits := self.cache.grow(sequence, num_tokens)):
            youngest = self.running[-1]
            if youngest is sequence or youngest in served:
                return 0
            self._preempt(youngest)
        return fits

    def _admit(self, sequence: SequenceState, prefix: Prefix, num_tokens: int) -> int:
        """Let a sequence that waits begin, if there are pages; returns for how many of its next tokens there are."""
        self.cache.begin(sequence, prefix)
        # Those that run each need a page soon; to take the last one would only get it preempted.
        fits = self.cache.grow(sequence, min(num_tokens, sequence.remaining), spare=len(self.running))
        if not fits:
            self.cache.release(sequence)
            return 0
        self.waiting.remove(sequence)
        sequence.row = self._rows.pop()
        insort(self.running, sequence, key=_number)
        self.num_shared += prefix.start
        return fits

    def _preempt(self, sequence: SequenceState) -> None:
        self._stop(sequence)
        self.add(sequence)
        self.num_preemptions += 1

    def _stop(self, sequence: SequenceState) -> None:
        self.running.remove(sequence)
        self._rows.append(sequence.row)
        sequence.row = -1
        self.cache.release(sequence)

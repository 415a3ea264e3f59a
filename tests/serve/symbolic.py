"""A model of numbers: what a transformer computes, with sums of hashes in place of products.

Each layer's output at a token depends on every key that the token sees, so a key that is missing, foreign or stale
changes all tokens that come after. It runs on the pages of a `Scheduler`, and checks them on the way.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from gptoss_opt.serve.cache import Cache, Group
from gptoss_opt.serve.pages import NOWHERE
from gptoss_opt.serve.scheduler import Scheduler, Work
from gptoss_opt.serve.sequence import SequenceState

VOCABULARY = 7
GARBAGE = 0xBAD


def mixed(*numbers: int) -> int:
    """A number that depends on each of some, and on their order."""
    return hash(numbers)


def groups_of(pattern: str, window: int) -> list[Group]:
    """Groups of layers from a pattern such as "sf": s slides, f is full."""
    kinds = {"s": ("sliding", window), "f": ("full", None)}
    return [
        Group(kinds[kind][0], tuple(n for n, one in enumerate(pattern) if one == kind), kinds[kind][1])
        for kind in dict.fromkeys(pattern)
    ]


def next_token(tokens: list[int], pattern: str, window: int) -> int:
    """The token after some, computed as plainly as can be."""
    hidden = [mixed(token) for token in tokens]
    for layer, kind in enumerate(pattern):
        keys = [mixed(layer, one) for one in hidden]
        first = [max(0, t - window + 1) if kind == "s" else 0 for t in range(len(tokens))]
        hidden = [mixed(one, *keys[first[t] : t + 1]) for t, one in enumerate(hidden)]
    return hidden[-1] % VOCABULARY


@dataclass(eq=False)
class Completion(SequenceState):
    """A sequence that is to have `max_tokens` tokens; none are wanted of one that was cancelled."""

    max_tokens: int = 0

    @classmethod
    def of(cls, prompt: list[int], max_new_tokens: int) -> Completion:
        """One that has only its prompt."""
        return cls(list(prompt), len(prompt), max_tokens=len(prompt) + max_new_tokens)

    @property
    def generated(self) -> list[int]:
        """What was generated so far."""
        return self.tokens[self.prompt_length :]


def pages_of(sequence: SequenceState) -> list[int]:
    """The pages that a sequence uses, of all groups."""
    return [page for table in sequence.block_tables for page in table if page != NOWHERE]


def is_last(work: Work) -> bool:
    """Whether a token is sampled after the tokens of a piece of work."""
    return work.num_tokens == work.sequence.remaining


@dataclass
class Machine:
    """A scheduler whose steps are computed by the model of numbers.

    Attributes:
        broken: a way in which it computes wrongly, as the real runner might: "writes shared" or "forgets first".
    """

    scheduler: Scheduler
    pattern: str
    broken: str = ""
    memory: dict[tuple[int, int, int], int] = field(default_factory=dict)
    known: dict[int, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, pattern: str, window: int, *, num_pages: int, page_size: int, rows: int, budget: int) -> Machine:
        """One with so many pages."""
        cache = Cache(num_pages + 1, groups_of(pattern, window), page_size)
        return cls(Scheduler(cache, rows, budget), pattern)

    def step(self) -> list[Work]:
        """Schedule, check the pages, compute, and sample."""
        works = self.scheduler.schedule()
        assert sum(work.num_tokens for work in works) <= self.scheduler.max_batch_tokens
        assert len(self.scheduler.running) <= self.scheduler.max_num_sequences
        self.check_pages()
        computed = [self._compute(work) for work in works]
        sampled = [(work.sequence, token) for work, token in zip(works, computed, strict=True) if is_last(work)]
        for work in works:
            self.scheduler.cache.advance(*work)
        self.check_pages()
        for sequence, token in sampled:
            sequence.tokens.append(token)
        return works

    def _compute(self, work: Work) -> int:
        sequence, count = work
        cache, size = self.scheduler.cache, self.scheduler.cache.page_size
        tokens = range(sequence.num_computed, sequence.num_computed + count)
        hidden = {t: mixed(sequence.tokens[t]) for t in tokens}
        places = {layer: (g, n) for g, group in enumerate(cache.groups) for n, layer in enumerate(group.layers)}
        for layer in range(len(self.pattern)):
            g, n = places[layer]
            window, table = cache.groups[g].window, sequence.block_tables[g]
            for t in tokens:
                shared = window is None and t < sequence.write_from
                if not shared or self.broken == "writes shared":
                    self.memory[table[t // size], t % size, n] = mixed(layer, hidden[t])
            outputs = {}
            for t in tokens:
                oldest = cache.groups[g].oldest_seen(t)
                if window is not None and self.broken != "forgets first":
                    oldest = max(oldest, sequence.first)
                assert NOWHERE not in table[oldest // size : t // size + 1], "a key is looked for where none is kept"
                seen = [self.memory.get((table[s // size], s % size, n), GARBAGE) for s in range(oldest, t + 1)]
                outputs[t] = mixed(hidden[t], *seen)
            hidden = outputs
        return hidden[tokens[-1]] % VOCABULARY

    def check_pages(self) -> None:
        """Counts are those of the tables; a page in two tables is full, and holds the same tokens in both."""
        cache, running = self.scheduler.cache, self.scheduler.running
        counted = Counter(page for sequence in running for page in pages_of(sequence))
        users = cache.pages.users
        assert {page: number for page, number in enumerate(users) if number} == dict(counted)
        assert cache.pages.num_used == len(counted)
        assert not any(pages_of(sequence) for sequence in self.scheduler.waiting)
        holds: dict[int, tuple[int, ...]] = {}
        size = cache.page_size
        for sequence in running:
            for g, table in enumerate(sequence.block_tables):
                for n, page in enumerate(table):
                    if page == NOWHERE or counted[page] == 1:
                        continue
                    content = (g, *sequence.tokens[: (n + 1) * size])
                    assert len(content) == 1 + (n + 1) * size, "a page that is not full is shared"
                    assert holds.setdefault(page, content) == content

    def check_window(self, sequence: SequenceState) -> None:
        """Sliding layers keep the pages of their last window, and no others."""
        cache = self.scheduler.cache
        for group, table in zip(cache.groups, sequence.block_tables, strict=True):
            behind = group.oldest_seen(sequence.num_computed) // cache.page_size
            assert all(page == NOWHERE for page in table[:behind])

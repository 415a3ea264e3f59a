"""Which pages each sequence has, in layers of each kind, and what of them another sequence may use again. No tensors.

Layers that see everything (full ones) keep a page for every `page_size` tokens. Sliding ones keep the last window: what
lies behind it is given back. Pages that are full are remembered by a digest of all tokens up to their end, so that a
sequence that begins with the same tokens need not compute them again. Such a sequence needs, up to where it goes on,
all pages of the full layers but only the last window of the sliding ones. If those are gone they are built anew: the
keys of a sliding layer depend on the window before them in the sliding layer below, so computing starts as many windows
back as there are sliding layers, and what is computed on the way is kept out of the shared pages.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .pages import NOWHERE, Pages
from .sequence import SequenceState


@dataclass(frozen=True)
class Group:
    """The layers of one kind.

    Attributes:
        kind: what the config calls them.
        layers: their numbers.
        window: how many tokens a query sees, its own included; None sees all.
    """

    kind: str
    layers: tuple[int, ...]
    window: int | None

    def oldest_seen(self, token: int) -> int:
        """The first token that a query at `token`, or any later one, sees."""
        return 0 if self.window is None else max(0, token - self.window + 1)


@dataclass(frozen=True)
class Prefix:
    """The pages of others that a sequence can begin with.

    Attributes:
        start: the first token that is computed.
        end: how many tokens the shared pages of the full layers hold.
        pages: by group, the pages that are shared; NOWHERE where none is needed.
    """

    start: int
    end: int
    pages: tuple[tuple[int, ...], ...]


class Cache:
    """The pages of all sequences.

    Args:
        num_pages: how many pages there are for all groups together, page `NOWHERE` included.
        groups: the kinds of layers.
        page_size: how many tokens share a page.
        share: whether sequences use each other's pages.
    """

    def __init__(self, num_pages: int, groups: Sequence[Group], page_size: int, *, share: bool = True) -> None:
        self.pages = Pages(num_pages)
        self.groups = tuple(groups)
        self.page_size = page_size
        self.share = share
        self.being_computed: dict[bytes, SequenceState] = {}
        sliding = [group for group in groups if group.window is not None]
        # How far back the last key of the last sliding layer depends on keys of sliding layers.
        self._depth = sum(len(group.layers) * ((group.window or 1) - 1) for group in sliding)
        self._depth_of_keys = self._depth - max(((group.window or 1) - 1 for group in sliding), default=0)

    def max_pages(self, num_tokens: int) -> int:
        """How many pages a sequence of so many tokens has at most, if it is computed by small chunks."""
        whole, size = -(-num_tokens // self.page_size), self.page_size
        return sum(
            whole if group.window is None else min(whole, -(-(group.window - 1) // size) + 1) for group in self.groups
        )

    def grow(self, sequence: SequenceState, num_tokens: int, *, spare: int = 0) -> int:
        """Give a sequence pages for its next `num_tokens` tokens, or for as many as leave `spare` pages over.

        Returns for how many of the tokens there are pages now; with 0 nothing has changed.
        """
        free, size = max(self.pages.num_free - spare, 0), self.page_size
        while num_tokens > 0:
            end = sequence.num_computed + num_tokens
            whole = -(-end // size)
            if sum([whole - len(table) for table in sequence.block_tables if len(table) < whole]) <= free:
                for table in sequence.block_tables:
                    while len(table) < whole:
                        table.append(self.pages.allocate())
                return num_tokens
            num_tokens = (end - 1) // size * size - sequence.num_computed
        return 0

    def prefix_of(self, sequence: SequenceState) -> Prefix | None:
        """What a sequence can begin with now; None while another one computes what it could use then."""
        size, groups = self.page_size, range(len(self.groups))
        nothing = Prefix(0, 0, tuple(() for _ in groups))
        # Logits are computed, not shared: those after the last token, and where a prompt is scored.
        num_pages = sequence.first_wanted // size
        if not self.share or not num_pages:
            return nothing
        digests = self._digests(sequence, num_pages)
        found = [[self.pages.find((g, digest)) for digest in digests] for g in groups]
        full = [found[g] for g, group in enumerate(self.groups) if group.window is None]
        num_full = next((n for n in range(num_pages) if any(pages[n] is None for pages in full)), num_pages)
        if num_full < num_pages and digests[num_full] in self.being_computed:
            return None
        ends = (n for n in range(num_full, 0, -1) if all(self._has_window(found[g], g, n) for g in groups))
        end = next(ends, 0) * size
        rebuilt = max(0, num_full * size - self._depth) // size * size if full else 0
        if rebuilt > end:
            shared = (found[g][:num_full] if group.window is None else () for g, group in enumerate(self.groups))
            return Prefix(rebuilt, num_full * size, tuple(tuple(page or NOWHERE for page in pages) for pages in shared))
        if not end:
            return nothing
        pages = []
        for g, group in enumerate(self.groups):
            begin = group.oldest_seen(end) // size
            pages.append((*[NOWHERE] * begin, *(page or NOWHERE for page in found[g][begin : end // size])))
        return Prefix(end, end, tuple(pages))

    def begin(self, sequence: SequenceState, prefix: Prefix) -> None:
        """Give a sequence that has nothing yet the pages of its prefix."""
        size = self.page_size
        sequence.num_computed, sequence.write_from = prefix.start, prefix.end
        rebuilds = prefix.start < prefix.end
        sequence.first = prefix.start if rebuilds else 0
        sequence.exact_from = prefix.start + self._depth_of_keys if rebuilds else 0
        sequence.block_tables = []
        for pages in prefix.pages:
            table = [page if page == NOWHERE else self.pages.share(page) for page in pages]
            table += [NOWHERE] * (prefix.start // size - len(table))
            sequence.block_tables.append(table)
        sequence.num_remembered = [len(table) for table in sequence.block_tables]
        sequence.num_told = [0] * len(sequence.block_tables)
        if self.share:
            for digest in self._digests(sequence, sequence.prompt_length // size)[prefix.end // size :]:
                self.being_computed.setdefault(digest, sequence)

    def advance(self, sequence: SequenceState, num_tokens: int) -> None:
        """Note that the next `num_tokens` tokens of a sequence are computed.

        Pages that are full now are remembered, and those that no query sees any more are given back.
        """
        sequence.num_computed += num_tokens
        size, remembered = self.page_size, sequence.num_remembered
        whole = sequence.num_computed // size if self.share else 0
        digests = self._digests(sequence, whole) if whole > min(remembered) else []
        for g, (group, table) in enumerate(zip(self.groups, sequence.block_tables, strict=True)):
            for n in range(remembered[g], whole):
                if table[n] != NOWHERE and (group.window is None or n * size >= sequence.exact_from):
                    self.pages.remember(table[n], (g, digests[n]))
                if self.being_computed.get(digests[n]) is sequence:
                    del self.being_computed[digests[n]]
            remembered[g] = max(remembered[g], whole)
            if group.window is not None:
                self._release(table, group.oldest_seen(sequence.num_computed) // size)

    def forget(self, running: Iterable[SequenceState]) -> None:
        """Share nothing of what was computed until now, or will be by the sequences that are `running`."""
        self.pages.forget()
        self.being_computed.clear()
        for sequence in running:
            sequence.num_remembered = [sys.maxsize] * len(self.groups)

    def release(self, sequence: SequenceState) -> None:
        """Take all pages of a sequence back: it has to be computed anew."""
        for table in sequence.block_tables:
            self._release(table, len(table))
        for digest in sequence.digests:
            if self.being_computed.get(digest) is sequence:
                del self.being_computed[digest]
        sequence.block_tables, sequence.num_remembered, sequence.num_computed = [], [], 0

    def _release(self, table: list[int], end: int) -> None:
        # From the last: the beginning of a text is what others share, and goes last.
        for n in range(min(end, len(table)) - 1, -1, -1):
            if table[n] == NOWHERE:
                # Within a window nothing was given back before its beginning.
                if end < len(table):
                    break
                continue
            self.pages.release(table[n])
            table[n] = NOWHERE

    def _has_window(self, pages: list[int | None], g: int, end: int) -> bool:
        """Whether `pages`, those found of a group, hold all that a query sees after the first `end` pages."""
        begin = self.groups[g].oldest_seen(end * self.page_size) // self.page_size
        return all(page is not None for page in pages[begin:end])

    def _digests(self, sequence: SequenceState, num_pages: int) -> list[bytes]:
        known = sequence.digests
        for n in range(len(known), num_pages):
            tokens = array("q", sequence.tokens[n * self.page_size : (n + 1) * self.page_size])
            known.append(hashlib.blake2b(tokens.tobytes(), key=known[-1] if known else b"", digest_size=16).digest())
        return known[:num_pages]

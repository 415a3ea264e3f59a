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
from collections.abc import Iterable
from collections.abc import Sequence as Tuples
from dataclasses import dataclass

from .pages import NOWHERE, Pages
from .sequence import Sequence


@dataclass(frozen=True)
class Group:
    """The layers of one kind.

    Attributes:
        kind: as the config calls them.
        layers: their numbers.
        window: how many tokens a query sees; None sees all.
    """

    kind: str
    layers: tuple[int, ...]
    window: int | None

    def oldest_seen(self, token: int) -> int:
        """The first token that a query at `token`, or any later one, sees."""
        return 0 if self.window is None else max(0, token - self.window + 1)


@dataclass(frozen=True)
class Prefix:
    """What of the pages of others a sequence can begin with.

    Attributes:
        start: where computing starts.
        end: how many tokens are there in the full layers.
        pages: by group, the pages it shares.
    """

    start: int
    end: int
    pages: tuple[tuple[int, ...], ...]


class Cache:
    """The pages of all sequences.

    Args:
        num_pages: how many there are, of all groups together.
        groups: the kinds of layers.
        page_size: tokens of a page.
        share: whether sequences use each other's pages.
    """

    def __init__(self, num_pages: int, groups: Tuples[Group], page_size: int, *, share: bool = True) -> None:
        self.pages = Pages(num_pages)
        self.groups = tuple(groups)
        self.page_size = page_size
        self.share = share
        self.being_computed: dict[bytes, Sequence] = {}
        sliding = [group for group in groups if group.window is not None]
        # How far back the last key of the last sliding layer depends on keys of sliding layers.
        self._depth = sum(len(group.layers) * ((group.window or 1) - 1) for group in sliding)
        self._depth_of_keys = self._depth - max(((group.window or 1) - 1 for group in sliding), default=0)

    def most_pages(self, num_tokens: int) -> int:
        """How many pages a sequence of so many tokens has at most, if it is computed by small chunks."""
        whole, size = -(-num_tokens // self.page_size), self.page_size
        return sum(
            whole if group.window is None else min(whole, -(-(group.window - 1) // size) + 1) for group in self.groups
        )

    def needs(self, sequence: Sequence, num_tokens: int) -> int:
        """How many more pages it takes to compute so many more of its tokens."""
        whole = -(-(sequence.num_computed + num_tokens) // self.page_size)
        return sum(max(0, whole - len(table)) for table in sequence.tables)

    def fitting(self, sequence: Sequence, num_tokens: int, spare: int = 0) -> int:
        """How many of so many more tokens there are pages for, if `spare` are left over."""
        while num_tokens > 0 and self.needs(sequence, num_tokens) > max(self.pages.num_free - spare, 0):
            end = sequence.num_computed + num_tokens
            num_tokens = max((end - 1) // self.page_size * self.page_size - sequence.num_computed, 0)
        return num_tokens

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Give it the pages for so many more tokens."""
        whole = -(-(sequence.num_computed + num_tokens) // self.page_size)
        for table in sequence.tables:
            table.extend(self.pages.allocate() for _ in range(whole - len(table)))

    def prefix_of(self, sequence: Sequence) -> Prefix | None:
        """What it can begin with now; None while another computes what it could use then."""
        size, groups = self.page_size, range(len(self.groups))
        nothing = Prefix(0, 0, tuple(() for _ in groups))
        # The last token is always computed: its logits are wanted.
        most = (len(sequence.tokens) - 1) // size
        if not self.share or not most:
            return nothing
        digests = self._digests(sequence, most)
        found = [[self.pages.find((g, digest)) for digest in digests] for g in groups]
        full = [found[g] for g, group in enumerate(self.groups) if group.window is None]
        num_full = next((n for n in range(most) if any(pages[n] is None for pages in full)), most)
        if num_full < most and digests[num_full] in self.being_computed:
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

    def begin(self, sequence: Sequence, prefix: Prefix) -> None:
        """Give a sequence that has nothing yet the pages of its prefix."""
        size = self.page_size
        sequence.num_computed, sequence.write_from = prefix.start, prefix.end
        rebuilds = prefix.start < prefix.end
        sequence.first = prefix.start if rebuilds else 0
        sequence.exact_from = prefix.start + self._depth_of_keys if rebuilds else 0
        sequence.tables = []
        for pages in prefix.pages:
            table = [page if page == NOWHERE else self.pages.share(page) for page in pages]
            table += [NOWHERE] * (prefix.start // size - len(table))
            sequence.tables.append(table)
        sequence.num_remembered = [len(table) for table in sequence.tables]
        sequence.num_told = [0] * len(sequence.tables)
        if self.share:
            for digest in self._digests(sequence, sequence.prompt_length // size)[prefix.end // size :]:
                self.being_computed.setdefault(digest, sequence)

    def advance(self, sequence: Sequence, num_tokens: int) -> None:
        """So many more of its tokens are computed: remember pages that are full, give back what no query sees."""
        sequence.num_computed += num_tokens
        size = self.page_size
        whole = sequence.num_computed // size
        digests = self._digests(sequence, whole) if self.share else []
        for g, (group, table) in enumerate(zip(self.groups, sequence.tables, strict=True)):
            for n in range(sequence.num_remembered[g], whole if self.share else 0):
                if table[n] != NOWHERE and (group.window is None or n * size >= sequence.exact_from):
                    self.pages.remember(table[n], (g, digests[n]))
                if self.being_computed.get(digests[n]) is sequence:
                    del self.being_computed[digests[n]]
            sequence.num_remembered[g] = max(sequence.num_remembered[g], whole)
            if group.window is not None:
                self._release(table, group.oldest_seen(sequence.num_computed) // size)

    def forget(self, running: Iterable[Sequence]) -> None:
        """Use nothing again of what was computed until now, or will be by sequences that run."""
        self.pages.forget()
        self.being_computed.clear()
        for sequence in running:
            sequence.num_remembered = [sys.maxsize] * len(self.groups)

    def release(self, sequence: Sequence) -> None:
        """Give all its pages back; it has nothing then."""
        for table in sequence.tables:
            self._release(table, len(table))
        for digest in sequence.digests:
            if self.being_computed.get(digest) is sequence:
                del self.being_computed[digest]
        sequence.tables, sequence.num_remembered, sequence.num_computed = [], [], 0

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
        """Whether a sequence can go on after so many pages with what was found of a group."""
        begin = self.groups[g].oldest_seen(end * self.page_size) // self.page_size
        return all(page is not None for page in pages[begin:end])

    def _digests(self, sequence: Sequence, num_pages: int) -> list[bytes]:
        """Of the tokens up to the end of each of the first pages."""
        known = sequence.digests
        for n in range(len(known), num_pages):
            tokens = array("q", sequence.tokens[n * self.page_size : (n + 1) * self.page_size])
            known.append(hashlib.blake2b(tokens.tobytes(), key=known[-1] if known else b"", digest_size=16).digest())
        return known[:num_pages]

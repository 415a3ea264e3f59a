"""Pages of key/value memory: who uses them, and which hold what may be used again. No tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

NOWHERE = 0
"""The page that belongs to nobody: what is to be kept nowhere goes there."""


class Pages:
    """Hands out pages, counts how many sequences use each, and finds one again by what it holds.

    A page that nobody uses keeps what it holds until it is handed out again: those that hold nothing known go first,
    then those never used, then those that were given back longest ago.

    Args:
        num_pages: how many there are, page `NOWHERE` included.
    """

    def __init__(self, num_pages: int) -> None:
        self.users = [0] * num_pages
        self._keys: list[Hashable | None] = [None] * num_pages
        self._page_of: dict[Hashable, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict()
        self._fresh = NOWHERE + 1  # from here on, pages were never used

    @property
    def num_pages(self) -> int:
        """How many pages there are to be used."""
        return len(self.users) - 1

    @property
    def num_free(self) -> int:
        """How many pages nobody uses."""
        return len(self._free) + len(self.users) - self._fresh

    @property
    def num_used(self) -> int:
        """How many pages somebody uses."""
        return self.num_pages - self.num_free

    def allocate(self) -> int:
        """Hand out a page to one user, who may write to it. There must be a free one."""
        page = next(iter(self._free), None)
        if (page is None or self._keys[page] is not None) and self._fresh < len(self.users):
            page, self._fresh = self._fresh, self._fresh + 1
        else:
            page, _ = self._free.popitem(last=False)
            self._forget(page)
        self.users[page] = 1
        return page

    def find(self, key: Hashable) -> int | None:
        """The page that holds what `key` stands for, used or not; None if there is none."""
        return self._page_of.get(key)

    def share(self, page: int) -> int:
        """Let one more user have a page that `find` found."""
        if not self.users[page]:
            del self._free[page]
        self.users[page] += 1
        return page

    def remember(self, page: int, key: Hashable) -> None:
        """Let a page be found by `key`: it is in use and full, and will not change. The first page of a key stays."""
        assert self.users[page]
        if key not in self._page_of:
            self._forget(page)
            self._page_of[key] = page
            self._keys[page] = key

    def release(self, page: int) -> None:
        """Take a page back from one of its users."""
        self.users[page] -= 1
        assert self.users[page] >= 0
        if not self.users[page]:
            self._free[page] = None
            if self._keys[page] is None:
                self._free.move_to_end(page, last=False)

    def forget(self) -> None:
        """Let nothing be found of what the pages hold now."""
        self._keys = [None] * len(self.users)
        self._page_of.clear()

    def _forget(self, page: int) -> None:
        key, self._keys[page] = self._keys[page], None
        if key is not None:
            del self._page_of[key]

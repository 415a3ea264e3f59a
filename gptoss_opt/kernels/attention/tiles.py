"""Cutting attention into tiles: dense rectangles of queries and keys that a plain flash kernel can do.

A sliding layer becomes blocks of queries that see only their keys; a chunk against a cache becomes a dense rectangle
(the cache) and a causal square (itself). Pure geometry.

A tile is one call of the kernel, on queries [b, G, t, D] and keys [b, G, s, D], with b whatever suits it:
- `queries(x)` is its view of a query-like tensor [B, N, G, T, *], `keys(x)` of a key-like one [B, N, G, S, D];
- `add_to_keys(total, part)` adds the kernel's gradient of the keys, [b, G, s, D], to a tensor [B, N, S, D];
- `causal` and `band` say which mask it needs, `first` that no earlier tile has the same queries.

Shapes: B batch, H = N * G query heads, N key/value heads, G query heads per key/value head, T queries, S keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from .visible import Segment

BLOCK = 128
"""Queries per block of a sliding layer: smaller blocks waste fewer masked products, larger ones run faster."""


@dataclass(frozen=True)
class Rectangle:
    """Queries `q0..q1` and keys `k0..k1` of one batch row, all heads."""

    row: int
    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool = False
    band: bool = False
    first: bool = True

    def queries(self, x: Tensor) -> Tensor:
        return x[self.row, :, :, self.q0 : self.q1]

    def keys(self, x: Tensor) -> Tensor:
        return x[self.row, :, :, self.k0 : self.k1]

    def add_to_keys(self, total: Tensor, part: Tensor) -> None:
        total[self.row, :, self.k0 : self.k1] += part.sum(1, dtype=total.dtype)


@dataclass(frozen=True)
class Blocks:
    """`count` neighbouring blocks of a sliding layer, one key/value head: their keys overlap, so they are views."""

    row: int
    head: int
    q0: int
    k0: int
    num_queries: int
    num_keys: int
    count: int
    causal: bool = False
    band: bool = True
    first: bool = True

    def queries(self, x: Tensor) -> Tensor:
        rows = x[self.row, self.head, :, self.q0 : self.q0 + self.count * self.num_queries]
        return rows.unflatten(1, (self.count, self.num_queries)).transpose(0, 1)

    def keys(self, x: Tensor) -> Tensor:
        return self._windows(x[self.row, self.head], 0, self.num_keys).transpose(0, 1)

    def add_to_keys(self, total: Tensor, part: Tensor) -> None:
        part = part.sum(1, dtype=total.dtype)
        # Strips no wider than the step between blocks do not overlap, so each can be added in place.
        for begin in range(0, self.num_keys, self.num_queries):
            end = min(begin + self.num_queries, self.num_keys)
            self._windows(total[self.row, self.head], begin, end).add_(part[:, begin:end])

    def _windows(self, x: Tensor, begin: int, end: int) -> Tensor:
        """Keys `begin..end` of every block, as a view [..., count, end - begin, D] of x [..., S, D]."""
        length = (self.count - 1) * self.num_queries + end - begin
        return x.narrow(-2, self.k0 + begin, length).unfold(-2, end - begin, self.num_queries).mT


Tile = Rectangle | Blocks


def tiles_of(segment: Segment, window: int | None, num_kv_heads: int) -> list[Tile]:
    """The tiles of a segment without holes; of queries behind the keys only where there is no window."""
    row, q0, q1, k0, k1 = segment.row, segment.q0, segment.q1, segment.k0, segment.k1
    if segment.behind:
        return [Rectangle(row, q0, q1, k0, k1)]
    shift = segment.slot - k0
    if window is None or k1 - k0 <= window:
        own = Rectangle(row, q0, q1, k0 + shift, k1, causal=True, first=not shift)
        return [Rectangle(row, q0, q1, k0, k0 + shift), own] if shift else [own]
    tiles: list[Tile] = []
    # The first queries have not filled their window yet: to them the layer is a full one.
    head = max(0, window - 1 - shift)
    if head:
        tiles += tiles_of(Segment(row, q0, q0 + head, k0, k0 + shift + head, segment.slot), None, num_kv_heads)
    q0, k0 = q0 + head, k0 + shift + head - (window - 1)
    count, tail = divmod(q1 - q0, BLOCK)
    if count:
        tiles += [Blocks(row, n, q0, k0, BLOCK, BLOCK + window - 1, count) for n in range(num_kv_heads)]
    if tail:
        tiles.append(Rectangle(row, q1 - tail, q1, k0 + count * BLOCK, k1, band=True))
    return tiles


def chunks_of(segment: Segment, window: int | None) -> Iterator[tuple[Rectangle, int]]:
    """The tiles of a segment that needs an explicit mask, in chunks of queries, so that memory stays linear.

    With each comes how many of its keys lie before the slot of its first query.
    """
    for begin in range(segment.q0, segment.q1, BLOCK):
        end = min(begin + BLOCK, segment.q1)
        slot = segment.slot + begin - segment.q0
        k0 = segment.k0 if window is None else max(segment.k0, slot - window + 1)
        k1 = min(segment.k1, slot + end - begin)
        if k0 < k1:
            yield Rectangle(segment.row, begin, end, k0, k1), slot - k0

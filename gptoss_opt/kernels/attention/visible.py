"""Which keys a query may see, told with a few small tensors instead of a [T, S] mask.

Shapes: B batch, H query heads, T queries, S key slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Visible(NamedTuple):
    """What restricts attention besides causality and the window. All fields None: plain causal, aligned at the end.

    Query `i` sits in key slot `q_start + i` and sees the slots up to its own, from where its sequence starts, except
    padding; a query in a padding slot does too. One that sees nothing sees its sink: its output is zero.

    A NamedTuple of tensors, so that it passes wherever a mask does: gradient checkpointing, device hooks, tracing.

    Attributes:
        q_start: integer, 0-d: the slot of the first query. None: S - T, the queries are the last T slots.
        keys: bool [B, S]: False is padding.
        starts: integer [B, T]: the index, among these T queries, of the first token of each query's own sequence.
            0 also means "continues what is in the cache".
        mask: [B or 1, H or 1, T, S], bool (True: may see) or additive. A user's own mask; it alone then decides, and
            the other fields and the window are not consulted.
    """

    q_start: Tensor | None = None
    keys: Tensor | None = None
    starts: Tensor | None = None
    mask: Tensor | None = None

    @property
    def everything(self) -> bool:
        """Whether nothing is restricted besides causality and the window."""
        return self.q_start is None and self.keys is None and self.starts is None and self.mask is None

    def contiguous(self) -> Visible:
        """The same with contiguous tensors: `generate` asks this of the masks it prepares for a static cache."""
        return Visible(*(None if field is None else field.contiguous() for field in self))


class Rules(NamedTuple):
    """What attention is asked for besides its tensors.

    Attributes:
        scale: what the logits are multiplied with.
        window: how many keys a query sees, its own included; None is all.
        visible: what else is hidden from which query.
    """

    scale: float
    window: int | None
    visible: Visible


@dataclass(frozen=True)
class Segment:
    """Queries `q0..q1` of batch row `row` see keys `k0..k1`, each those up to its own slot.

    Attributes:
        slot: that of the first query. Either the last query sits in that of the last key, or all sit behind it, which
            are the queries of padding at the end.
        holes: whether there is padding between the keys.
    """

    row: int
    q0: int
    q1: int
    k0: int
    k1: int
    slot: int
    holes: bool = False

    @property
    def behind(self) -> bool:
        """Whether all queries sit behind the last key."""
        return self.slot >= self.k1


def dense_mask(visible: Visible, num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """The same as a bool mask, [B or 1, 1, T, S]: defines what a `Visible` means. Not for `visible.mask`."""
    slot = torch.arange(num_queries, device=device) + _first_slot(visible, num_queries, num_keys)
    key = torch.arange(num_keys, device=device)
    mask = (key <= slot[:, None])[None]
    if window is not None:
        mask = mask & (key > slot[:, None] - window)
    if visible.starts is not None:
        start = torch.where(visible.starts == 0, 0, visible.starts + slot[0])
        mask = mask & (key >= start[:, :, None])
    if visible.keys is not None:
        mask = mask & visible.keys[:, None, :]
    return mask[:, None]


def _first_slot(visible: Visible, num_queries: int, num_keys: int) -> Tensor | int:
    return num_keys - num_queries if visible.q_start is None else visible.q_start


def first_slot(visible: Visible, num_queries: int, num_keys: int) -> int:
    """The slot of the first query, as a number (on a GPU this waits for the device)."""
    slot = int(_first_slot(visible, num_queries, num_keys))
    if not 0 <= slot <= num_keys - num_queries:
        raise ValueError(
            f"q_start is {slot}, but {num_queries} queries among {num_keys} keys start at 0 to "
            f"{num_keys - num_queries}."
        )
    return slot


def segments(visible: Visible, batch: int, num_queries: int, num_keys: int) -> list[Segment]:
    """Cut attention into plain causal problems: for each batch row and packed sequence one, and one for padding behind.

    Reads the tensors of `visible` (on a GPU this waits for the device). Not for `visible.mask`.
    """
    p = first_slot(visible, num_queries, num_keys)
    ranges = _key_ranges(visible.keys) if visible.keys is not None else [(0, num_keys, False)] * batch
    cuts = _cuts(visible.starts, batch, num_queries)
    found: list[Segment] = []
    for row, (low, high, holes) in enumerate(ranges):
        for begin, end in zip(cuts[row], cuts[row][1:], strict=False):
            k0 = max(low, p + begin if begin else 0)
            q0, q1 = max(begin, low - p), min(end, high - p)
            if q0 < q1:
                found.append(Segment(row, q0, q1, k0, p + q1, p + q0, holes))
            q0 = max(begin, high - p)
            if q0 < end and k0 < high:
                found.append(Segment(row, q0, end, k0, high, p + q0, holes))
    return found


def _key_ranges(keys: Tensor) -> list[tuple[int, int, bool]]:
    """For each row of keys [B, S]: the first valid slot, one past the last, and whether there are holes between."""
    low = keys.int().argmax(-1)
    count = keys.sum(-1)
    high = torch.where(count > 0, keys.shape[-1] - keys.flip(-1).int().argmax(-1), low)
    rows = torch.stack([low, high, high - low - count], -1).tolist()
    return [(first, past, missing > 0) for first, past, missing in rows]


def _cuts(starts: Tensor | None, batch: int, num_queries: int) -> list[list[int]]:
    if starts is None:
        return [[0, num_queries]] * batch
    begins: list[list[int]] = [[] for _ in range(batch)]
    changed = starts[:, 1:] != starts[:, :-1]
    for row, index in changed.nonzero().tolist():
        begins[row].append(index + 1)
    return [[0, *middle, num_queries] for middle in begins]


def starts_from_positions(position_ids: Tensor, valid: Tensor | None = None) -> Tensor:
    """Where each token's sequence begins, given positions [B, T] that restart in packed rows: integer [B, T].

    A sequence begins where the position does not grow. Positions of padding are arbitrary: with `valid` (bool [B, T],
    False is padding) a token is compared with the last valid one before it.
    """
    if valid is None:
        valid = torch.ones_like(position_ids, dtype=torch.bool)
    before = _before(valid)
    position_ids = position_ids.expand(len(valid), -1)
    restarts = position_ids <= position_ids.gather(-1, before.clamp(min=0))
    return _last(valid & (before >= 0) & restarts, 0)


def starts_from_segments(segment_ids: Tensor) -> Tensor:
    """Where each token's sequence begins, given the numbers of packed sequences [B, T], from 1 up: integer [B, T].

    0 is padding, which belongs to the sequence before it. A sequence begins where the number is another than that of
    the last token before.
    """
    valid = segment_ids > 0
    before = _before(valid)
    differs = segment_ids != segment_ids.gather(-1, before.clamp(min=0))
    return _last(valid & (before >= 0) & differs, 0)


def _before(valid: Tensor) -> Tensor:
    """The last valid token before each one of bool [B, T]; -1 where there is none."""
    return torch.nn.functional.pad(_last(valid, -1)[:, :-1], (1, 0), value=-1) if valid.shape[1] else valid.long()


def _last(marks: Tensor, missing: int) -> Tensor:
    """For each place of bool [B, T] the last one up to it that is marked."""
    if not marks.shape[1]:
        return marks.long()
    return torch.where(marks, torch.arange(marks.shape[1], device=marks.device), missing).cummax(-1).values


def starts_from_cu_seq_lens(cu_seq_lens: Tensor, num_queries: int) -> Tensor:
    """Where each token's sequence begins, given cumulative lengths [num_sequences + 1] of one row: integer [1, T].

    Tokens after the last length (padding of a packed row) form a sequence of their own.
    """
    cu_seq_lens = cu_seq_lens.long()
    index = torch.arange(num_queries, device=cu_seq_lens.device)
    return cu_seq_lens[torch.bucketize(index, cu_seq_lens, right=True) - 1][None]

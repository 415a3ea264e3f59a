"""Who holds what: arithmetic on sizes and loads, without tensors of a model and without processes."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise


def split(size: int, degree: int, *, unit: int = 1) -> tuple[range, ...]:
    """`size` in `degree` ranges of whole units, as even as they go; the first ones are larger by one unit.

    Args:
        size: a multiple of `unit`.
        degree: how many ranges, from 1 up. Those beyond the number of units are empty.
        unit: what stays together, such as a block of 32 packed values.

    Raises:
        ValueError: `degree` is below 1, or `size` is not a multiple of `unit`.

    Example:
        >>> split(8, 3)
        (range(0, 3), range(3, 6), range(6, 8))
        >>> [len(part) // 32 for part in split(2880, 4, unit=32)]
        [23, 23, 22, 22]
    """
    if degree < 1:
        raise ValueError(f"split: degree is {degree}. Use 1 or more.")
    if size % unit:
        raise ValueError(f"split: {size} is not a multiple of {unit}.")
    each, more = divmod(size // unit, degree)
    bounds = [unit * (rank * each + min(rank, more)) for rank in range(degree + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(bounds))


def balance_experts(load: Sequence[Sequence[float]], degree: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """A placement of experts under which a measured load spreads evenly over ranks, layer by layer.

    The heaviest expert that is left goes to the lightest rank, until none is left (longest processing time first,
    Graham 1969): no rank has more than 4/3 of what the best placement gives its fullest, and none can be relieved of
    more than its largest single expert. Ranks may hold different numbers of experts; each holds one at least.

    Args:
        load: for each layer, how many tokens (or any other measure) each expert gets; finite, not negative.
        degree: the number of ranks, at most the number of experts.

    Returns:
        For each layer and rank the experts it holds, ascending.

    Raises:
        ValueError: there is no load, layers differ in length, a load is negative or not finite, or there are more
            ranks than experts.

    Example:
        >>> balance_experts([[8, 1, 1, 6]], degree=2)
        (((0,), (1, 2, 3)),)
    """
    counts = {len(layer) for layer in load}
    if len(counts) != 1 or not max(counts):
        raise ValueError("balance_experts: give a load for each layer, and in each one for every expert.")
    num_experts = counts.pop()
    if not 1 <= degree <= num_experts:
        raise ValueError(f"balance_experts: {num_experts} experts do not go on {degree} ranks. Use 1 to {num_experts}.")
    if bad := [value for layer in load for value in layer if not 0 <= value < float("inf")]:
        raise ValueError(f"balance_experts: a load is {bad[0]}. Loads are finite and not negative.")
    return tuple(_balance([float(value) for value in layer], degree) for layer in load)


def _balance(load: list[float], degree: int) -> tuple[tuple[int, ...], ...]:
    held: list[list[int]] = [[] for _ in range(degree)]
    # Of ranks with one load the one with the fewest experts comes first, so that none stays empty.
    lightest = [(0.0, 0, rank) for rank in range(degree)]
    for expert in sorted(range(len(load)), key=lambda expert: -load[expert]):
        total, count, rank = heapq.heappop(lightest)
        held[rank].append(expert)
        heapq.heappush(lightest, (total + load[expert], count + 1, rank))
    return tuple(tuple(sorted(experts)) for experts in held)

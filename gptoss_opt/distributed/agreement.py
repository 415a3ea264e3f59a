"""Ranks compare notes before they do anything together, so that none is left waiting for one that does otherwise."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import distributed

_MEETINGS: Counter[tuple[int, ...]] = Counter()
"""How often this rank has met with which ranks."""

MAX_SHOWN = 5
"""How many disagreements are spelled out."""

GONE = json.dumps(None)
"""What a rank says in a meeting after it has given up waiting, so that nobody who comes later takes it for present."""


def disagreements(statement: Mapping[str, str], problems: Sequence[str], ranks: Sequence[int]) -> list[str]:
    """Compare what the ranks say; return what differs and what stands in the way on others, as sentences.

    This goes through the store that brought the processes together, not through a collective: ranks that disagree on
    who takes part would wait in it for ever.

    Args:
        statement: what must be the same on all ranks, by name.
        problems: what stands in the way on this rank; only the problems of other ranks are returned.
        ranks: the ranks that take part, this one among them. All of them must call this equally often.

    Raises:
        TimeoutError: a rank did not come within the time that the process group waits.
    """
    rank = distributed.get_rank()
    said = exchanged({"statement": dict(statement), "problems": list(problems)}, ranks)
    found = [
        f"on rank {other}: {problem}"
        for other, saying in said.items()
        for problem in saying["problems"]
        if other != rank and problem not in problems
    ]
    # Where one cannot go on, it does not matter in what it is otherwise.
    if found or problems:
        return found
    return list(_differences({other: saying["statement"] for other, saying in said.items()}))


def exchanged(value: Any, ranks: Sequence[int]) -> dict[int, Any]:
    """What each rank says, by rank, through the same store.

    Args:
        value: what this rank says: something that JSON can hold, and not None.
        ranks: the ranks that take part, this one among them. All of them must call this equally often.

    Raises:
        TimeoutError: a rank did not come within the time that the process group waits.
    """
    store: Any = distributed.distributed_c10d._get_default_store()
    rank, mine = distributed.get_rank(), json.dumps(value)
    said: dict[int, Any] = {}
    while None in said.values() or not said:
        said = _meet(store, rank, tuple(ranks), mine)
    return said


def _meet(store: Any, rank: int, ranks: tuple[int, ...], mine: str) -> dict[int, Any]:
    """Exchange what each rank says in the next meeting of these ranks; None for a rank that has given up waiting."""
    keys = {other: f"gptoss_opt/{ranks}/{_MEETINGS[ranks]}/{other}" for other in ranks}
    _MEETINGS[ranks] += 1
    store.set(keys[rank], mine)
    try:
        store.wait(list(keys.values()), store.timeout)
    except (RuntimeError, ValueError) as error:
        store.set(keys[rank], GONE)
        missing = [str(other) for other, key in keys.items() if not store.check([key])]
        raise TimeoutError(
            f"rank {rank} waited {store.timeout.total_seconds():g} s for rank {', '.join(missing)}, which did not wrap "
            "its model as well, or verify it. Every rank must do the same in the same order; see whether it has died."
        ) from error
    return {other: json.loads(store.get(key)) for other, key in keys.items()}


def _differences(said: Mapping[int, Mapping[str, str]]) -> Iterator[str]:
    everything = dict.fromkeys(key for statement in said.values() for key in statement)
    differ = [what for what in everything if len({statement.get(what) for statement in said.values()}) > 1]
    for what in differ[:MAX_SHOWN]:
        values: dict[str, list[int]] = {}
        for rank, statement in said.items():
            values.setdefault(statement.get(what, "nothing"), []).append(rank)
        each = "; ".join(f"{value} on rank {', '.join(map(str, ranks))}" for value, ranks in values.items())
        yield f"the ranks disagree on {what}: {each}. Give all ranks the same."
    if len(differ) > MAX_SHOWN:
        yield f"and on {len(differ) - MAX_SHOWN} more, such as {differ[MAX_SHOWN]}."

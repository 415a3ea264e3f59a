"""Ranks compare notes before they do anything together, so that none is left waiting for one that does otherwise."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from torch import distributed

_MEETINGS = itertools.count()


def disagreements(statement: Mapping[str, str], problems: Sequence[str], ranks: Sequence[int]) -> list[str]:
    """What these ranks do not say alike, and what stands in the way on others; the same sentences on every rank.

    Through the store that brought the processes together, not by a collective: ranks that disagree on who takes part
    would wait in it for ever.

    Args:
        statement: what is to be the same on all ranks, by what it is called.
        problems: what stands in the way on this rank. Those of others are returned.
        ranks: who takes part, this one among them. All of them must come here equally often.

    Raises:
        TimeoutError: a rank did not come within the time that the process group waits.
    """
    store: Any = distributed.distributed_c10d._get_default_store()
    rank = distributed.get_rank()
    meeting = next(_MEETINGS)
    keys = {other: f"gptoss_opt/meeting {meeting}/{other}" for other in ranks}
    store.set(keys[rank], json.dumps({"statement": dict(statement), "problems": list(problems)}))
    said = {}
    for other, key in keys.items():
        try:
            store.wait([key], store.timeout)
        except (RuntimeError, ValueError) as error:
            raise TimeoutError(
                f"rank {rank} waited {_seconds(store.timeout)} for rank {other}, which did not wrap its model as well. "
                "Every rank must apply the same wrappers in the same order; see whether that rank has died."
            ) from error
        said[other] = json.loads(store.get(key))
    found = [
        f"on rank {other}: {problem}"
        for other, saying in said.items()
        for problem in saying["problems"]
        if other != rank and problem not in problems
    ]
    return found + list(_differences({other: saying["statement"] for other, saying in said.items()}))


def _differences(said: Mapping[int, Mapping[str, str]]) -> Iterator[str]:
    for what in dict.fromkeys(key for statement in said.values() for key in statement):
        values: dict[str, list[int]] = {}
        for rank, statement in said.items():
            values.setdefault(statement.get(what, "nothing"), []).append(rank)
        if len(values) > 1:
            each = "; ".join(f"{value} on rank {', '.join(map(str, ranks))}" for value, ranks in values.items())
            yield f"the ranks disagree on {what}: {each}. Give all ranks the same."


def _seconds(time: timedelta) -> str:
    return f"{time.total_seconds():g} s"

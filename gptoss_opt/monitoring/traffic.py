"""`Traffic`: counts the collectives of a forward and its backward pass."""

from __future__ import annotations

import threading
from collections.abc import Callable

from .clock import Clock

COMMUNICATION = "communication"


class Traffic:
    """Is told of the collectives of this process, makes them, and counts those that are made while a clock runs.

    What other models send between the forward and the backward pass is not counted.

    Attributes:
        counts: bytes, calls and seconds.
        thread: only what this one does is counted; None counts that of all, as backward passes have threads of theirs.
    """

    def __init__(self, clock: Clock) -> None:
        self.counts = {"bytes": 0.0, "calls": 0.0, "seconds": 0.0}
        self.thread: int | None = None
        self._clock = clock

    def __call__(self, kind: str, num_bytes: int, call: Callable[[], object]) -> None:
        """Make a collective: how many bytes its tensor has, and the call itself."""
        if not self._clock.runs or self.thread not in (None, threading.get_ident()):
            call()
            return
        begun = self._clock.seconds[COMMUNICATION]
        self._clock.begin(COMMUNICATION)
        call()
        self._clock.end()
        self.counts["seconds"] += self._clock.seconds[COMMUNICATION] - begun
        self.counts["bytes"] += num_bytes
        self.counts["calls"] += 1

"""`Clock`: how long a model computes what; each moment counts for one part alone."""

from __future__ import annotations

import time

import torch

from .step import PARTS


class Clock:
    """Seconds by part. Parts begin within each other, and the innermost one has the time.

    Attributes:
        seconds: by part, in the order of `PARTS`.

    Example:
        >>> clock = Clock(torch.device("cpu"))
        >>> clock.begin("other")
        >>> clock.begin("attention")
        >>> clock.end()
        >>> clock.stop()
        >>> [part for part, seconds in clock.seconds.items() if seconds]
        ['attention', 'other']
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._device = device
        self._running: list[str] = []
        self._since = 0.0

    @property
    def runs(self) -> bool:
        """Whether any part has begun and not ended."""
        return bool(self._running)

    def begin(self, part: str) -> None:
        """Begin a part within the one that runs, if any."""
        self._turn()
        self._running.append(part)

    def end(self) -> None:
        """End the part that began last: the one around it goes on."""
        self._turn()
        self._running.pop()

    def turn_to(self, part: str) -> None:
        """End the part that runs, if any, and begin this one in its place."""
        self._turn()
        self._running[-1:] = [part]

    def stop(self) -> None:
        """End all parts."""
        self._turn()
        self._running.clear()

    def _turn(self) -> None:
        # Parts are told apart on a GPU by waiting for each: that is why not every step is measured.
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

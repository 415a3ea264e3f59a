"""Ctrl-C, as a wish to stop."""

from __future__ import annotations

import os
import signal
import threading


class Interrupt:
    """Ctrl-C while a run steps: the first asks it to stop and save after its step, the second stops it at once."""

    def __init__(self) -> None:
        self.asked = False
        # Signals come to the main thread alone.
        self._listens = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Interrupt:
        if self._listens:
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not print, which may be at work where the signal came.
        os.write(2, b"\nstopping after this step, and saving; Ctrl-C again stops at once\n")

    def __exit__(self, *_: object) -> None:
        if self._listens:
            signal.signal(signal.SIGINT, self._before)

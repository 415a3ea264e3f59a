"""Who makes the steps: a thread in the background, or whoever waits for a request. One at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from .engine import Engine
from .request import GenerationError, Request

HEARTBEAT = 10.0
"""Seconds after which ranks that wait for work are told that there is none."""

Decode = Callable[[list[int]], str]


class Stepper:
    """Makes the steps of an engine, and hands it the requests that other threads send.

    Attributes:
        closed: why no more requests are taken, or None.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.closed: BaseException | None = None
        self._stepping = threading.Lock()
        self._news = threading.Condition()  # of what is below
        self._inbox: list[tuple[Request, Decode | None]] = []
        self._thread: threading.Thread | None = None
        self._stopping = False

    @property
    def in_background(self) -> bool:
        """Whether a thread makes the steps."""
        return self._thread is not None

    @property
    def leads(self) -> bool:
        """Whether this rank schedules."""
        return self.engine.mesh is None or self.engine.mesh.is_first

    def check_open(self) -> None:
        """Raise `GenerationError` if it is closed."""
        if self.closed is not None:
            raise GenerationError(f"the batcher is closed ({self.closed}). Make another.") from self.closed

    def send(self, requests: Iterable[Request], decode: Decode | None) -> None:
        """Let requests be completed. From any thread."""
        with self._news:
            self.check_open()
            self._inbox += [(request, decode) for request in requests]
            self._news.notify_all()

    def step(self) -> bool:
        """Make a step; False if there was nothing to do, or it is the thread's to make."""
        return not self.in_background and self._step()

    def start(self) -> None:
        """Let a thread make the steps; on other ranks than the first, it follows."""
        self.check_open()
        if self._thread is not None:
            raise RuntimeError("the batcher has been entered already.")
        self._thread = threading.Thread(target=self._loop if self.leads else self._follow, name="batcher", daemon=True)
        self._thread.start()

    def close(self, error: GenerationError, *, wait: bool) -> None:
        """Take no more; what was sent comes to its end if asked to `wait`, else ends with the error."""
        thread = self._thread
        with self._news:
            self._stopping = True
            self._news.notify_all()
        if thread is not None and (wait or not self.leads):
            thread.join()
        while wait and thread is None and self._step():
            pass
        self._fail(error)
        if thread is not None and self.leads:
            thread.join()
            self.engine.dismiss()
        self._thread = None

    def _step(self) -> bool:
        with self._stepping:
            with self._news:
                if self.closed is not None:
                    return False
                arrived, self._inbox = self._inbox, []
            for request, decode in arrived:
                self.engine.add(request, decode)
            try:
                return self.engine.step()
            except Exception as error:  # told to all who wait, and to whoever comes later
                failed = error
            except BaseException:
                self.engine.interrupt()
                raise
        self._fail(failed)
        return False

    def _loop(self) -> None:
        while self.closed is None:
            if self._step():
                continue
            with self._news:
                if self._inbox:
                    continue
                if self._stopping:
                    break
                in_vain = not self._news.wait(HEARTBEAT)
            if in_vain:
                self.engine.idle()

    def _follow(self) -> None:
        try:
            self.engine.follow()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Nothing goes on, and nothing is taken any more. Waits for a step that is being made."""
        with self._news:
            self.closed = self.closed or error
            arrived, self._inbox = self._inbox, []
            self._news.notify_all()
        with self._stepping:
            for request, decode in arrived:
                self.engine.add(request, decode)
            self.engine.fail(error)

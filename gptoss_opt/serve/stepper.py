"""Who makes the steps: a thread in the background, or whoever waits for a request. One at a time."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from .engine import Answer, Engine
from .request import GenerationError, Request

HEARTBEAT = 10.0
"""Seconds after which ranks that wait for work are told that there is none."""


class Stepper:
    """Makes the steps of an engine, and hands it the requests that other threads send.

    Attributes:
        closed: why no more requests are taken, or None.
        thread: makes the steps in the background, or follows the first rank's; None where there is no such thread.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.closed: BaseException | None = None
        self._stepping = threading.Lock()
        self._maker: int | None = None  # the thread that holds it
        self._news = threading.Condition()  # of what is below
        self._inbox: list[Request] = []
        self.thread: threading.Thread | None = None
        self._stopping = False

    @property
    def leads(self) -> bool:
        """Whether this rank schedules."""
        return self.engine.mesh is None or self.engine.mesh.is_first

    def check_open(self) -> None:
        """Raise `GenerationError` if no more requests are taken."""
        if self.closed is not None:
            raise GenerationError(f"the batcher is closed ({self.closed}). Make another.") from self.closed

    def send(self, requests: Iterable[Request]) -> None:
        """Let requests be completed. From any thread."""
        with self._news:
            self.check_open()
            if self._stopping:
                raise GenerationError("the batcher is being closed. Make another.")
            self._inbox += requests
            self._news.notify_all()

    def step(self) -> bool:
        """Make a step; False if there was nothing to do, or a thread in the background makes the steps."""
        self._check_apart()
        return self.thread is None and self._step()

    def forget(self) -> None:
        """Between two steps, let nothing be shared of what the pages hold."""
        self._check_apart()
        with self._stepping:
            self.engine.scheduler.cache.forget(self.engine.scheduler.running)

    def start(self) -> None:
        """Let a thread make the steps, or follow the first rank's."""
        self.check_open()
        if self.thread is not None:
            raise RuntimeError("the batcher has been entered already.")
        self.thread = threading.Thread(target=self._loop if self.leads else self._follow, name="batcher", daemon=True)
        self.thread.start()

    @contextmanager
    def lead(self) -> Iterator[list[Any]]:
        """Let other ranks `follow` the block: that returns the list which the block fills, or raises what it raises."""
        # Whatever closes this rank closes the others: none waits for an answer.
        self.check_open()
        answer = Answer([])
        try:
            yield answer.result
        except BaseException as error:
            # Of others nobody knows whether they can be sent.
            known = isinstance(error, ValueError | GenerationError)
            told = error if known else GenerationError(f"the first rank failed: {error!r}")
            answer = Answer(error=told, closed=self.closed is not None)
            raise
        finally:
            if self.thread is None:
                self.engine.tell(answer)

    def follow(self) -> list[Any]:
        """Compute what the first rank says until its call ends; return what that returns, or raise what it raises."""
        self.check_open()
        try:
            answer = self.engine.follow()
        except BaseException as error:
            self._fail(error)
            raise GenerationError(f"the step failed: {error!r}") from error
        if answer.error is not None:
            if answer.closed:
                self._fail(answer.error)
            raise answer.error
        return list(answer.result)

    def close(self, error: GenerationError, *, wait: bool) -> None:
        """Take no more requests. Those that were sent come to their end if asked to `wait`, else end with the error.

        Raises `GenerationError` where this rank followed, and failed.
        """
        self._check_apart()
        thread = self.thread
        with self._news:
            self._stopping = True
            self._news.notify_all()
        if thread is not None and (wait or not self.leads):
            thread.join()
        while wait and thread is None and self._step():
            pass
        failed = self.closed
        self._fail(error)
        self.engine.runner.free()
        if thread is not None:
            thread.join()
            self.thread = None
            if self.leads:
                self.engine.tell(Answer())
            elif failed is not None:
                self.check_open()

    def _check_apart(self) -> None:
        """Raise `RuntimeError` within a step, where waiting for it would never end."""
        if threading.get_ident() in (self._maker, self.thread and self.thread.ident):
            raise RuntimeError("the batcher cannot be used from within one of its own steps, only submitted to.")

    def _step(self) -> bool:
        with _interrupts_wait():
            with self._stepping:
                self._maker = threading.get_ident()
                try:
                    return self._step_alone()
                except BaseException as error:
                    failed = error
                finally:
                    self._maker = None
            # Told to all who wait, and to whoever comes later.
            self._fail(failed)
            if isinstance(failed, Exception):
                return False
            raise failed

    def _step_alone(self) -> bool:
        with self._news:
            if self.closed is not None:
                return False
            arrived, self._inbox = self._inbox, []
        for request in arrived:
            self.engine.add(request)
        return self.engine.step()

    def _loop(self) -> None:
        while self.closed is None:
            try:
                if self._step():
                    continue
            except BaseException:  # told to all already
                break
            with self._news:
                if self._inbox:
                    continue
                if self._stopping:
                    break
                in_vain = not self._news.wait(HEARTBEAT)
            if in_vain:
                self.engine.tell(None)

    def _follow(self) -> None:
        try:
            self.engine.follow()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._news:
            self.closed = self.closed or error
            arrived, self._inbox = self._inbox, []
            self._news.notify_all()
        for request in arrived:
            request.end("error", error)
        with self._stepping:
            self.engine.fail(error)


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C raise at the end of the block, so that nothing is left half done; a second one raises at once."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[tuple[int, Any]] = []

    def note(number: int, frame: Any) -> None:
        came.append((number, frame))
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        before(*came[0])

"""What the user holds while a completion is made: read it as it comes, wait for it, or cancel it. Safe in threads."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any

from .options import Options
from .sampler import Drawn, Logprobs
from .sequence import Scored, SequenceState

Decode = Callable[[list[int]], str]


def _done() -> bool:
    return False


def _sequence_of(prompt: list[int], options: Options) -> SequenceState:
    # After the last token of a prompt that is only scored, no logits are wanted.
    tokens = list(prompt if options.max_new_tokens else prompt[:-1])
    if not options.prompt_logprobs:
        return SequenceState(tokens, len(tokens))
    start = len(prompt) - options.prompt_logprobs
    return SequenceState(tokens, len(tokens), Scored(start - 1, tuple(prompt[start:]), options.logprobs or 0))


class GenerationError(RuntimeError):
    """A completion could not be made.

    Attributes:
        tokens: the ids that were made until then.
        results: what `generate` has for all prompts, if it is `generate` that raises.
    """

    def __init__(self, message: str, tokens: list[int] | None = None) -> None:
        super().__init__(message)
        self.tokens = tokens or []
        self.results: list[Any] = []


class Request:
    """One completion: what `ContinuousBatcher.submit` returns.

    Iterate over it, also with `async for`, to get the token ids as they are made; several may do so at once, each from
    the beginning. What was made is kept until you drop it, so that nobody has to keep up: it is never more than
    `max_new_tokens` ids.

    Attributes:
        prompt: its token ids.
        options: what was asked for.
        completion: which of the completions of its prompt it is, from 0.
        tokens: the ids made so far, the stop token included.
        logprobs: the log-probabilities of each of the tokens, if asked for.
        prompt_logprobs: those of the last tokens of the prompt, if asked for: all are there once the first token is
            made, or with `max_new_tokens=0` at the end.
        cancelled: whether `cancel` was called.
        finish_reason: "stop" (a stop token or string), "length", "cancelled" or "error"; None while it goes on.
        error: what went wrong, or None.
        submitted, times: when it was submitted and when each token came, by `time.perf_counter`.
        completions: all requests of the same prompt (`num_return_sequences` of them).
        decode: makes text of ids where stop strings are looked for, else None.
    """

    def __init__(
        self, prompt: list[int], options: Options, completion: int, step: Callable[[], bool], decode: Decode | None
    ) -> None:
        self.prompt, self.options, self.completion, self.decode = prompt, options, completion, decode
        self.sequence = _sequence_of(prompt, options)
        self.tokens: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.prompt_logprobs: list[Logprobs] = []
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self.completions: tuple[Request, ...] = (self,)
        self.submitted, self.times = time.perf_counter(), list[float]()
        self._changed = threading.Condition()
        self._wakers: list[Callable[[], None]] = []
        self._step, self.cancelled = step, False

    def __repr__(self) -> str:
        state = self.finish_reason or ("cancelled" if self.cancelled else "going on")
        return f"<Request of {len(self.prompt)} tokens: {len(self.tokens)} made, {state}>"

    @property
    def done(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None

    def cancel(self) -> None:
        """Ask for no more tokens. Those that were made stay; other requests are not touched. Never waits."""
        self.cancelled = True

    def result(self, timeout: float | None = None) -> list[int]:
        """The token ids, once all are made; if it was cancelled, those made until then.

        Raises:
            TimeoutError: after `timeout` seconds; it goes on all the same.
            GenerationError: something went wrong; its `tokens` are those that were made.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._wait(len(self.tokens), deadline):
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"{self!r} after {timeout} s. It goes on: ask again, or cancel() it.")
        self._raise_if_failed()
        return list(self.tokens)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for more tokens or the end, `timeout` seconds at most. Returns whether it is the end."""
        return self._wait(len(self.tokens), None if timeout is None else time.monotonic() + timeout)

    def __iter__(self) -> Iterator[int]:
        given, done = 0, False
        while not done:
            done = self._wait(given, None)
            fresh = self.tokens[given:]
            given += len(fresh)
            yield from fresh
        self._raise_if_failed()

    async def __aiter__(self) -> AsyncIterator[int]:
        loop, changed, given = asyncio.get_running_loop(), asyncio.Event(), 0

        def wake() -> None:
            # Whoever made the loop may have closed it meanwhile.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._wakers.append(wake)
        try:
            while True:
                changed.clear()
                done = self.done
                for token in self.tokens[given:]:
                    given += 1
                    yield token
                if done:
                    break
                if self._step():
                    await asyncio.sleep(0)
                else:
                    await changed.wait()
        finally:
            with self._changed:
                self._wakers.remove(wake)
        self._raise_if_failed()

    def _wait(self, given: int, deadline: float | None) -> bool:
        """Wait for more than `given` tokens, for the end, or the deadline. Returns whether it is the end."""
        while not self.done and len(self.tokens) <= given:
            if deadline is not None and time.monotonic() >= deadline:
                break
            # Where no thread makes the steps, this one does.
            if not self._step():
                with self._changed:
                    if not self.done and len(self.tokens) <= given:
                        left = None if deadline is None else max(deadline - time.monotonic(), 0)
                        self._changed.wait(left)
        return self.done

    def _raise_if_failed(self) -> None:
        if self.error is not None:
            what = str(self.error) if isinstance(self.error, GenerationError) else f"the step failed: {self.error!r}"
            raise GenerationError(what, list(self.tokens)) from self.error

    def push(self, drawn: Drawn, finish_reason: str | None) -> None:
        """Append a token, and tell all who wait. The batcher calls this; `finish_reason` says why it is the last."""
        assert drawn.token is not None
        with self._changed:
            self.times.append(time.perf_counter())
            if drawn.logprobs is not None:
                self.logprobs.append(drawn.logprobs)
            self.tokens.append(drawn.token)
            self._notify(finish_reason)

    def end(self, finish_reason: str, error: BaseException | None = None) -> None:
        """Say that no more tokens will come, and tell all who wait. The batcher calls this."""
        with self._changed:
            self.error = error
            self._notify(finish_reason)

    def _notify(self, finish_reason: str | None) -> None:
        self.finish_reason = finish_reason
        if finish_reason is not None:
            self._step = _done  # and no longer the batcher, which may be dropped
        self._changed.notify_all()
        for wake in self._wakers:
            wake()

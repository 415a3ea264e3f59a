"""What all requests share: the batcher, the tokenizer, the limits, and what is open."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import anyio
from fastapi import Request as HttpRequest

from ..serve import ContinuousBatcher, Request, TooLongError
from .channels import Channels
from .choices import Choice
from .errors import ApiError

RETRY_AFTER = 1
"""Seconds after which a client that was refused for the load may come again."""

T = TypeVar("T")


@dataclass(eq=False)
class Work:
    """What one HTTP request has asked of the batcher. Whoever has it closes it.

    Attributes:
        choices: the completions, in the order of their numbers.
        prompt_tokens: how many tokens the prompts have.
        service: where it is open.
    """

    choices: list[Choice]
    prompt_tokens: int
    service: Service

    @property
    def usage(self) -> dict[str, int]:
        """The numbers of tokens so far."""
        made = sum(choice.num_tokens for choice in self.choices)
        total = self.prompt_tokens + made
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": made, "total_tokens": total}

    def cancel(self) -> None:
        """Ask for no more tokens."""
        for choice in self.choices:
            choice.request.cancel()

    def close(self) -> None:
        """Ask for no more tokens, and make room for others. A second call does nothing."""
        self.cancel()
        self.service.open.discard(self)


@dataclass(eq=False)
class Service:
    """Takes work in, within limits.

    Attributes:
        batcher: completes prompts.
        tokenizer: that of the model.
        name: what clients call the model.
        context: how many tokens a prompt and its completion may have together.
        max_num_sequences: how many completions are made at once.
        max_waiting: how many more may wait.
        channels: makes what splits a chat's tokens into what is thought and what is said.
        api_key: what clients must know, or None.
        created: when the server was started, in seconds since 1970.
        open: the work that is not answered yet.
        draining: whether no more is taken, as the server shuts down.
    """

    batcher: ContinuousBatcher
    tokenizer: Any
    name: str
    context: int
    max_num_sequences: int
    max_waiting: int
    channels: Callable[[], Channels]
    api_key: str | None
    created: int
    open: set[Work] = field(default_factory=set[Work])
    draining: bool = False
    _one_at_a_time: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(1))

    async def aside(self, call: Callable[..., T], *given: Any, **options: Any) -> T:
        """What a call of the tokenizer gives, made in a thread so that streams go on meanwhile; one at a time."""
        return await anyio.to_thread.run_sync(partial(call, *given, **options), limiter=self._one_at_a_time)

    def check_model(self, name: str) -> None:
        """Raise `ApiError` unless this is the model that is served."""
        if name != self.name:
            message = f"there is no model {name!r} here, only {self.name!r}."
            raise ApiError(message, status=404, param="model", code="model_not_found")

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int | None,
        sampling: Mapping[str, Any],
        stop: Sequence[str],
        logprobs: int | None,
        channels: Callable[[], Channels],
        param: str,
    ) -> Work:
        """Let prompts be completed, and return at once.

        Args:
            prompts: the token ids of each.
            max_tokens: how many new tokens each may have; None for as many as there is room.
            sampling: options of `ContinuousBatcher.submit`.
            stop: strings that end a completion, and are no part of it.
            logprobs: for how many of the likeliest tokens log-probabilities are given, or None.
            channels: makes what splits the tokens of one completion.
            param: the field that the prompts are from, for errors.

        Raises:
            ApiError: a prompt cannot be completed, or there is no room.
        """
        self._check_room(len(prompts) * sampling["num_return_sequences"])
        # All are checked before one is submitted.
        lengths = [self._new_tokens(len(prompt), max_tokens, param) for prompt in prompts]
        requests: list[Request] = []
        try:
            for prompt, length in zip(prompts, lengths, strict=True):
                first = self.batcher.submit(list(prompt), max_new_tokens=length, logprobs=logprobs, **sampling)
                requests += first.completions
        except ValueError as error:
            for request in requests:
                request.cancel()
            too_long = isinstance(error, TooLongError)
            raise ApiError(str(error), param=param, code=TOO_LONG if too_long else None) from error
        choices = [Choice(number, request, channels(), stop) for number, request in enumerate(requests)]
        work = Work(choices, sum(map(len, prompts)), self)
        self.open.add(work)
        return work

    def cancel(self) -> None:
        """Ask for no more tokens of anything."""
        for work in self.open:
            work.cancel()

    def _new_tokens(self, length: int, max_tokens: int | None, param: str) -> int:
        if not length:
            raise ApiError("the prompt has no tokens. Give one at least.", param=param)
        wanted = max(self.context - length, 1) if max_tokens is None else max_tokens
        if length + wanted > self.context:
            message = (
                f"this model's maximum context length is {self.context} tokens, and the prompt has {length} and the "
                f"completion {wanted}. Shorten one of them."
            )
            raise ApiError(message, param=param, code=TOO_LONG)
        return wanted

    def _check_room(self, asked: int) -> None:
        if self.draining:
            raise ApiError("the server is shutting down.", status=503, code="shutting_down")
        most = self.max_num_sequences + self.max_waiting
        if asked > most:
            raise ApiError(f"{asked} completions are asked for, and the server takes {most} at once.", param="n")
        there = sum(len(work.choices) for work in self.open)
        if there + asked > most:
            raise ApiError(
                f"{there} completions are made or wait already, and the server takes {most} at once. Come again later.",
                status=429,
                code="rate_limit_exceeded",
                headers={"Retry-After": str(RETRY_AFTER)},
            )


TOO_LONG = "context_length_exceeded"
"""OpenAI's code for prompts that are too long."""


def service_of(http: HttpRequest) -> Service:
    """The service of the app that a request is for."""
    found: Service = http.app.state.service
    return found

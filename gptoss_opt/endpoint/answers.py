"""How work is answered: as one JSON object, or as a stream of events. A client that hangs up cancels it."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ..serve import GenerationError
from .choices import Choice, Piece, merged
from .errors import ApiError, told
from .service import Work

Json = dict[str, Any]


@dataclass(frozen=True)
class Form(ABC):
    """What the choices of one route's answers look like.

    Attributes:
        prefix: what the ids of answers begin with.
        kind, kind_of_chunk: what a whole answer and an event of a stream are called.
        tokenizer: writes single tokens.
        with_logprobs: whether choices have log-probabilities.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]
    kind_of_chunk: ClassVar[str]
    tokenizer: Any
    with_logprobs: bool

    @abstractmethod
    def first(self) -> Json | None:
        """A choice of the event that comes before all text, or None if there is no such event."""

    @abstractmethod
    def whole(self, piece: Piece) -> Json:
        """A choice of a whole answer."""

    @abstractmethod
    def chunk(self, piece: Piece) -> Json:
        """A choice of an event."""

    def text(self, token: int) -> str:
        """A single token as text."""
        return str(self.tokenizer.decode([token]))


@dataclass(frozen=True)
class Envelope:
    """What is around the choices.

    Attributes:
        form: of the choices.
        work: what is answered.
        with_usage: whether a stream ends with the numbers of tokens.
        id, created: of the answer.
    """

    form: Form
    work: Work
    with_usage: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def __call__(self, kind: str, choices: list[Json], **more: Any) -> Json:
        name = self.work.service.name
        about = {"id": f"{self.form.prefix}-{self.id}", "object": kind, "created": self.created, "model": name}
        return {**about, "choices": choices, **more}

    async def whole(self) -> Json:
        """The whole answer, once all is made."""
        pieces = {choice: Piece() for choice in self.work.choices}
        async for choice, piece in merged(self.work.choices):
            pieces[choice] += piece
        choices = [_numbered(choice, piece.finish_reason, self.form.whole(piece)) for choice, piece in pieces.items()]
        return self(self.form.kind, choices, usage=self.work.usage)

    async def events(self) -> AsyncIterator[str]:
        """The answer in server-sent events, as it is made. An error is the last of them."""
        kind, more = self.form.kind_of_chunk, {"usage": None} if self.with_usage else {}
        try:
            if (first := self.form.first()) is not None:
                for choice in self.work.choices:
                    yield _event(self(kind, [_numbered(choice, None, first)], **more))
            async for choice, piece in merged(self.work.choices):
                one = _numbered(choice, piece.finish_reason, self.form.chunk(piece))
                yield _event(self(kind, [one], **more))
        except (ApiError, GenerationError) as error:
            yield _event(told(error).body())
            return
        if self.with_usage:
            yield _event(self(kind, [], usage=self.work.usage))
        yield "data: [DONE]\n\n"


async def answer(http: HttpRequest, work: Work, form: Form, *, stream: bool, with_usage: bool) -> Response:
    """The answer to work, which is closed with it."""
    envelope = Envelope(form, work, with_usage)
    if stream:
        return EventStream(envelope.events(), work)
    try:
        with _cancelled_when_they_hang_up(http, work):
            return JSONResponse(await envelope.whole())
    finally:
        work.close()


class EventStream(StreamingResponse):
    """Server-sent events. However it ends, and even if it never begins, the work is closed."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], work: Work) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._work.close()


@contextmanager
def _cancelled_when_they_hang_up(http: HttpRequest, work: Work) -> Iterator[None]:
    async def watch() -> None:
        # The body was read before: what comes now is the end of the connection.
        while (await http.receive())["type"] != "http.disconnect":
            pass
        work.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


def _numbered(choice: Choice, finish_reason: str | None, form: Json) -> Json:
    return {"index": choice.index, **form, "finish_reason": finish_reason}


def _event(value: Json) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"

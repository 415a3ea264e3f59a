"""One completion as it comes: its tokens become pieces of text, with log-probabilities, up to a stop string."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from ..serve import Logprobs, Request, StopStrings
from .channels import NEITHER, SAID, THOUGHT, Channels
from .errors import ApiError


@dataclass
class Piece:
    """Some more of a completion; pieces that are added are one.

    Attributes:
        content, reasoning: what is said, and what is thought.
        logprobs: the log-probabilities of the tokens of `content`, and where in all content each token begins.
        finish_reason: "stop" or "length" in the last piece, else None.
    """

    content: str = ""
    reasoning: str = ""
    logprobs: Sequence[tuple[int, Logprobs]] = ()
    finish_reason: str | None = None

    def __add__(self, other: Piece) -> Piece:
        return Piece(
            self.content + other.content,
            self.reasoning + other.reasoning,
            [*self.logprobs, *other.logprobs],
            other.finish_reason or self.finish_reason,
        )


@dataclass(eq=False)
class Choice:
    """One of the completions that an HTTP request asks for.

    Attributes:
        index: its number.
        request: makes its tokens.
        channels: splits them.
        stop: strings that end it, and are no part of it. They are looked for in what is said alone.
        num_tokens: how many tokens were made so far; after a stop string none is counted.
    """

    index: int
    request: Request
    channels: Channels
    stop: Sequence[str]
    num_tokens: int = 0

    async def pieces(self) -> AsyncIterator[Piece]:
        """Its pieces, as they come. The last one has a reason.

        Raises:
            ApiError: it was cancelled, as the server shuts down.
            GenerationError: it cannot be completed.
        """
        stops, length, given = StopStrings(self.stop), 0, 0
        held: list[tuple[int, Logprobs]] = []  # of tokens whose text is not given on yet

        def said(text: str, *, last: bool = False) -> Piece:
            nonlocal length, given
            length += len(text)
            text = stops.add(text)
            if last:
                text += stops.end()
            given += len(text)
            all_of_it = last and not stops.stopped
            ready = [one for one in held if all_of_it or one[0] < given]
            del held[: len(ready)]
            return Piece(text, logprobs=ready)

        async for token in self.request:
            if stops.stopped:
                continue  # made before the request heard of it
            self.num_tokens += 1
            if token in self.request.options.stop_token_ids:
                continue
            part, text = self.channels.add(token)
            if part == SAID:
                if self.request.logprobs:
                    held.append((length, self.request.logprobs[self.num_tokens - 1]))
                piece = said(text)
                if piece.content:
                    yield piece
                if stops.stopped:
                    self.request.cancel()
            elif part == THOUGHT and text:
                yield Piece(reasoning=text)
        if self.request.finish_reason == "cancelled" and not stops.stopped:
            raise ApiError("the server is shutting down, and has cancelled this.", status=503, code="shutting_down")
        part, text = self.channels.end()
        assert part in (SAID, NEITHER)
        end = said(text, last=True)
        end.finish_reason = "stop" if stops.stopped else self.request.finish_reason
        yield end


async def merged(choices: Sequence[Choice]) -> AsyncIterator[tuple[Choice, Piece]]:
    """The pieces of several completions, in the order in which they come. Raises what the first that fails raises."""
    queue: asyncio.Queue[tuple[Choice, Piece | Exception]] = asyncio.Queue()

    async def pump(choice: Choice) -> None:
        try:
            async for piece in choice.pieces():
                queue.put_nowait((choice, piece))
        except Exception as error:
            queue.put_nowait((choice, error))

    pumps = [asyncio.create_task(pump(choice)) for choice in choices]
    going = len(choices)
    try:
        while going:
            choice, piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            going -= piece.finish_reason is not None
            yield choice, piece
    finally:
        for one in pumps:
            one.cancel()

"""Many prompts through a batcher, a few hundred in its hands at a time, each handed back as soon as it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from ..serve import ContinuousBatcher, Request

MAX_GOING = 512
"""How many requests a batcher is given at once: enough to choose from, whatever the number of prompts."""


class Ask(NamedTuple):
    """What is asked for one prompt.

    Attributes:
        prompt: its token ids.
        options: those of `ContinuousBatcher.submit`.
        until: strings that end the completion once its text, without the prompt, holds one.
    """

    prompt: list[int]
    options: Mapping[str, Any]
    until: Sequence[str] = ()


def completed(
    batcher: ContinuousBatcher, asks: Sequence[Ask], decode: Callable[[list[int]], str]
) -> Iterator[tuple[int, Request]]:
    """The number of each of the `asks` with its request, which is done, in the order in which they come to their end.

    Raises:
        ValueError: the batcher refuses a prompt or an option.
        GenerationError: one could not be completed. The others are cancelled then, as they are when nobody reads on.
    """
    going: dict[int, Request] = {}
    left = iter(enumerate(asks))
    try:
        while True:
            for number, ask in islice(left, MAX_GOING - len(going)):
                going[number] = batcher.submit(ask.prompt, **ask.options)
            if not going:
                return
            if not batcher.step():  # a thread of the batcher makes the steps
                next(iter(going.values())).wait(0.1)
            for number, request in list(going.items()):
                if request.done:
                    request.result()
                    yield number, going.pop(number)
                elif request.tokens and _holds(request.tokens, asks[number].until, decode):
                    request.cancel()
    finally:
        for request in going.values():
            request.cancel()


def _holds(tokens: list[int], strings: Sequence[str], decode: Callable[[list[int]], str]) -> bool:
    """Whether the end of a text holds one of the strings; what was there before was looked at before."""
    # As a rule a token is a byte of text at least.
    longest = max([len(one.encode()) for one in strings], default=0) + 1
    text = decode(tokens[-longest:])
    return any(one in text for one in strings)

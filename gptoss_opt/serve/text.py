"""The text of tokens that come one by one: in whole characters, and up to a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

UNFINISHED = "\ufffd"
"""What a tokenizer writes for a character of which some tokens are still to come."""


class SettledText:
    """The text of tokens as they come. A character of several tokens is held back until it is whole.

    Each token costs as much as the few before it that its text may depend on, however long the text is.

    Args:
        tokenizer: any that can `decode`.

    Example:
        >>> class Bytes:
        ...     def decode(self, tokens, skip_special_tokens):
        ...         return bytes(tokens).decode(errors="replace")
        >>> text = SettledText(Bytes())
        >>> [text.add(token) for token in "aé!".encode()], text.end()
        (['a', '', 'é', '!'], '')
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # those whose text was given last, and those whose text was not
        self._num_given = 0

    def add(self, token: int) -> str:
        """Take a token, and return the text that is settled now and was not before."""
        self._tokens.append(token)
        return self._fresh(last=False)

    def end(self) -> str:
        """The text that was held back, once no token follows."""
        return self._fresh(last=True)

    def _fresh(self, *, last: bool) -> str:
        # Some tokenizers write a token in another way at the beginning: so what was given last is decoded once more.
        given, text = self._decode(self._tokens[: self._num_given]), self._decode(self._tokens)
        if text.endswith(UNFINISHED) and not last:
            return ""
        fresh = text[len(given) :]
        if fresh:
            self._tokens = self._tokens[self._num_given :]
            self._num_given = len(self._tokens)
        return fresh

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""


class StopStrings:
    """Gives text on up to the first stop string, and holds back what may be the beginning of one.

    Attributes:
        stopped: whether one was found. No more text is given on then.

    Example:
        >>> stop = StopStrings(["END"])
        >>> [stop.add(text) for text in ("go E", "V", "EN", "D no")], stop.stopped
        (['go ', 'EV', '', ''], True)
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        self._strings, self._held, self.stopped = tuple(strings), "", False

    def add(self, text: str) -> str:
        """Take text, and return what is before any stop string and cannot be part of one."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [start for one in self._strings if (start := text.find(one)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        begun = (n for one in self._strings for n in range(1, len(one)) if text.endswith(one[:n]))
        split = len(text) - max(begun, default=0)
        self._held = text[split:]
        return text[:split]

    def end(self) -> str:
        """The text that was held back, once no text follows."""
        text, self._held = self._held, ""
        return text


def pieces(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens, piece by piece while they come. No piece is empty."""
    text = SettledText(tokenizer)
    for token in tokens:
        if piece := text.add(token):
            yield piece
    if piece := text.end():
        yield piece

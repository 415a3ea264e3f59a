"""What a token is part of: what the model says, what it thinks, or neither. By openai-harmony, or all is said."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from ..serve import GenerationError, SettledText

SAID, THOUGHT, NEITHER = "content", "reasoning_content", ""

MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
"""The special tokens that harmony's format is made of."""


class Text(NamedTuple):
    """Text that has become settled, and what it is part of: `SAID`, `THOUGHT` or `NEITHER`."""

    part: str
    text: str


class Channels(Protocol):
    """Takes the tokens of one completion, one by one."""

    def add(self, token: int) -> Text:
        """Take a token. A character of several tokens is held back until it is whole."""

    def end(self) -> Text:
        """The text that was held back, once no token follows."""


class Plain:
    """All that a model writes is said; special tokens are left out."""

    def __init__(self, tokenizer: Any) -> None:
        self._text = SettledText(tokenizer)

    def add(self, token: int) -> Text:
        return Text(SAID, self._text.add(token))

    def end(self) -> Text:
        return Text(SAID, self._text.end())


class Harmony:
    """What a model writes in harmony's format: the channel `analysis` is thought, all others are said.

    A message to a tool is said too, as `to=NAME ` and the text of the call.

    Args:
        parser: a new `openai_harmony.StreamableParser` for the role of the assistant.
    """

    def __init__(self, parser: Any) -> None:
        self._parser, self._to = parser, ""

    def add(self, token: int) -> Text:
        try:
            self._parser.process(token)
        except Exception as error:
            raise GenerationError(f"the model does not keep to the harmony format: {error}") from error
        return self._settled()

    def end(self) -> Text:
        return Text(NEITHER, "")

    def _settled(self) -> Text:
        channel, recipient = self._parser.current_channel, self._parser.current_recipient
        text = self._parser.last_content_delta or ""
        if channel is None:
            self._to = ""
            return Text(NEITHER, "")
        if recipient and recipient != self._to:
            self._to, text = recipient, f"to={recipient} {text}"
        return Text(THOUGHT if channel == "analysis" and not recipient else SAID, text)


def maker(tokenizer: Any, harmony: bool | None) -> Callable[[], Channels]:
    """What makes the channels of a completion of a chat.

    Args:
        tokenizer: that of the model.
        harmony: whether openai-harmony splits; None: where it is installed and the tokenizer is that of GPT-OSS.

    Raises:
        ValueError: it is asked for, and is not installed, or the tokenizer is another; or its vocabulary is not there.
    """
    if harmony is False:
        return lambda: Plain(tokenizer)
    problem = None
    if importlib.util.find_spec("openai_harmony") is None:
        problem = "openai-harmony is not installed: pip install openai-harmony"
    elif not tokenizer.get_vocab().keys() >= set(MARKS):
        problem = "the tokenizer is not that of GPT-OSS: it lacks special tokens of the harmony format"
    if harmony is None and problem:
        return lambda: Plain(tokenizer)
    if problem:
        raise ValueError(f"harmony=True: {problem}. Or leave it out.")
    import openai_harmony

    try:
        encoding = openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
    except openai_harmony.HarmonyError as error:
        raise ValueError(
            f"openai-harmony cannot read its vocabulary ({error}). Let it be downloaded once, or put "
            "o200k_base.tiktoken into a folder that TIKTOKEN_ENCODINGS_BASE names, or use harmony=False "
            "(--no-harmony): then what the model thinks is part of the text."
        ) from error
    ours, theirs = ([made(mark) for mark in MARKS] for made in (tokenizer.convert_tokens_to_ids, _ids_in(encoding)))
    if ours != theirs:
        raise ValueError(f"the tokenizer numbers {', '.join(MARKS)} {ours}, and harmony {theirs}. Use harmony=False.")
    return lambda: Harmony(openai_harmony.StreamableParser(encoding, role=openai_harmony.Role.ASSISTANT))


def _ids_in(encoding: Any) -> Callable[[str], int]:
    def one(mark: str) -> int:
        (token,) = encoding.encode(mark, allowed_special={mark})
        return int(token)

    return one

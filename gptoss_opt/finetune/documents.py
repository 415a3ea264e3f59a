"""One row of training data as tokens: a text, a prompt with its completion, or the messages of a chat."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The label of a token that is not learnt, as in transformers."""

FORMS = {"messages": ("messages",), "text": ("text",), "prompt and completion": ("prompt", "completion")}
"""The forms that a row can have, and the keys of each."""

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What a chat template has around the turns of the assistant, if it marks them."""

Segment = tuple[str, bool]
"""A piece of text, and whether it is learnt."""
Render = Callable[..., Any]
"""`apply_chat_template` of a tokenizer, of one row: messages to text, with `add_generation_prompt` if wanted."""


class RowError(ValueError):
    """A row cannot be trained on; the message is the reason, without the name of the row."""


@dataclass(frozen=True, eq=False)
class Document:
    """The tokens of one row, which are packed together with others but see none of them.

    Attributes:
        tokens: int32 [T].
        learnt: bool [T], the tokens that the model is to learn to predict.
    """

    tokens: Tensor
    learnt: Tensor

    @classmethod
    def of(cls, tokens: Sequence[int], learnt: Sequence[int] | None = None) -> Document:
        """A document of these tokens, by default all learnt.

        Example:
            >>> Document.of([7, 8, 9], [0, 1, 1]).num_labels
            2
        """
        every = [1] * len(tokens) if learnt is None else learnt
        return cls(torch.tensor(tokens, dtype=torch.int32), torch.tensor(every, dtype=torch.bool))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_labels(self) -> int:
        """How many tokens are learnt. The first never is: it has nothing before it to be predicted from."""
        return int(self.learnt[1:].sum())

    @property
    def labels(self) -> Tensor:
        """int64 [T]: the tokens that are learnt, and `IGNORED` elsewhere.

        A model compares the label of a token with what it predicts from the one before, which of the first token is
        the last of another document.
        """
        labels = self.tokens.long().masked_fill(~self.learnt, IGNORED)
        labels[:1] = IGNORED
        return labels

    def cut(self, length: int) -> Document:
        """The first tokens, so many at most."""
        return Document(self.tokens[:length], self.learnt[:length])


def document_of(row: object, tokenizer: Any) -> Document:
    """The document of one row of a file.

    Of {"text": ...} all tokens are learnt; of {"prompt": ..., "completion": ...} those of the completion. Both get the
    tokenizer's end token. Of {"messages": [{"role": ..., "content": ...}, ...]} the assistant's turns are learnt, as
    the chat template writes them: what it marks by {% generation %}, or else all from where it would prompt the
    assistant up to where it would prompt the next message. "tools" beside the messages go to the template too.

    Raises:
        RowError: the row is not one of these, or nothing of it is learnt.
    """
    keys = _keys(row)
    assert isinstance(row, Mapping)
    if keys == FORMS["messages"]:
        document = _chat(row["messages"], tokenizer, row.get("tools"))
    else:
        last = len(keys) - 1
        texts = [(_text(key, row[key]), number == last) for number, key in enumerate(keys)]
        document = _ended(_joined(texts, tokenizer, special=True), tokenizer)
    if not document.num_labels:
        raise RowError("it has no token that could be learnt: the first one has nothing to be predicted from")
    return document


def _keys(row: object) -> tuple[str, ...]:
    """The keys of the form that a row has."""
    if not isinstance(row, Mapping):
        raise RowError(f"it is a JSON {_kind(row)}, and should be an object")
    if not row:
        raise RowError("it is empty")
    found = [keys for keys in FORMS.values() if any(key in row for key in keys)]
    if not found:
        raise RowError(f"its keys are {', '.join(map(repr, row))}; known are {', '.join(FORMS)}")
    if len(found) > 1:
        raise RowError(f"it has {' and '.join(repr(keys[0]) for keys in found)}, and should have one of them")
    for key in found[0]:
        if key not in row:
            raise RowError(f"it has no {key!r}")
    return found[0]


def _kind(value: object) -> str:
    names: dict[type, str] = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise RowError(f"{name} is a JSON {_kind(value)}, and should be a string")
    if not value.strip():
        raise RowError(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{name} has half a character (a lone surrogate) at {error.start}") from error
    return value


def _joined(segments: Iterable[Segment], tokenizer: Any, *, special: bool = False) -> Document:
    """Segments one after the other, each tokenised by itself, as a prompt is before its answer is there.

    With `special` the first has the special tokens that the tokenizer puts around a text, but for the end token.
    """
    tokens: list[int] = []
    learnt: list[bool] = []
    for text, learns in segments:
        found = tokenizer(text, add_special_tokens=special and not tokens)["input_ids"]
        if special and found and found[-1] == tokenizer.eos_token_id:
            found = found[:-1]
        if special and not found:
            raise RowError(f"{text[:20]!r} gives no tokens")
        tokens += found
        learnt += [learns] * len(found)
    return Document.of(tokens, learnt)


def _ended(document: Document, tokenizer: Any) -> Document:
    return Document.of([*document.tokens.tolist(), tokenizer.eos_token_id], [*document.learnt.tolist(), True])


def _chat(messages: object, tokenizer: Any, tools: object) -> Document:
    checked = list(_messages(messages))
    if not any(message["role"] == "assistant" for message in checked):
        raise RowError("it has no message of the assistant, so there is nothing to learn")
    if not tokenizer.chat_template:
        raise RowError("the tokenizer has no chat template for messages")

    def render(messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        try:
            return tokenizer.apply_chat_template(messages, tools=tools, **{"tokenize": False, **options})
        except Exception as error:  # whatever a template raises, about this row
            raise RowError(f"the chat template refuses it ({type(error).__name__}: {error})") from error

    _check_written(checked, render)
    if MARKED.search(tokenizer.get_chat_template(tools=tools)):
        marked = render(checked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return Document.of(marked["input_ids"], marked["assistant_masks"])
    return _joined(_turns(checked, render), tokenizer)


def _messages(messages: object) -> Iterator[Mapping[str, Any]]:
    """The messages of a chat, whose shape is right."""
    if not isinstance(messages, list):
        raise RowError(f"messages is a JSON {_kind(messages)}, and should be a list")
    if not messages:
        raise RowError("messages is empty")
    for number, message in enumerate(messages, 1):
        name = f"message {number}"
        if not isinstance(message, dict):
            raise RowError(f"{name} is a JSON {_kind(message)}, and should be an object")
        if "role" not in message:
            raise RowError(f"{name} has no role")
        _text(f"the role of {name}", message["role"])
        if not message.get("tool_calls"):
            if "content" not in message:
                raise RowError(f"{name} has no content")
            _text(f"the content of {name}", message["content"])
        yield message


def _check_written(messages: Sequence[Mapping[str, Any]], render: Render) -> None:
    """Find messages that the template leaves out without a word, as it does with roles that it does not know."""
    words = {number: f"content{number}." for number, message in enumerate(messages, 1) if not message.get("tool_calls")}
    named = [{**message, "content": words[n]} if n in words else message for n, message in enumerate(messages, 1)]
    written = render(named)
    for number, word in words.items():
        if word not in written:
            role = messages[number - 1]["role"]
            raise RowError(f"the chat template does not write message {number}, whose role is {role!r}")


def _turns(messages: Sequence[Mapping[str, Any]], render: Render) -> Iterator[Segment]:
    """The text of a chat, cut where turns of the assistant begin and end: by what the template writes for its start.

    A turn ends where the prompt for the next would begin: the end token of a turn that others follow may be another
    than that of the last.
    """
    whole, done = render(messages), 0
    first = next(number for number, message in enumerate(messages) if message["role"] == "assistant")
    if not first:
        raise RowError("message 1 is the assistant's, and the chat template does not mark where what it says begins")
    prompt = len(render(messages[:first], add_generation_prompt=True)) - len(render(messages[:first]))
    for number in range(first, len(messages)):
        if messages[number]["role"] != "assistant":
            continue
        before = render(messages[:number], add_generation_prompt=True)
        after = whole
        if number + 1 < len(messages):
            after = render(messages[: number + 1], add_generation_prompt=True)
            after = after[: len(after) - prompt]
        for text in (before, after):
            if not whole.startswith(text):
                raise RowError(
                    f"the chat template writes what comes before the end of message {number + 1} in another way when "
                    "more follows, and does not mark what the assistant says"
                )
        yield whole[done : len(before)], False
        yield whole[len(before) : len(after)], True
        done = len(after)
    yield whole[done:], False

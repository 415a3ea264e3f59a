"""What is thought and what is said: by openai-harmony, and in answers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import openai
import pytest

from gptoss_opt.endpoint.channels import MARKS, Harmony, Plain, maker
from gptoss_opt.endpoint.choices import Choice, Piece
from gptoss_opt.serve import GenerationError
from gptoss_opt.serve.options import Options
from gptoss_opt.serve.request import Request
from gptoss_opt.serve.sampler import Drawn
from tests.endpoint.served import NAME, Served
from tests.finetune import chats


def answered(channels: Any, tokens: Sequence[int], stop: Sequence[str] = ()) -> Piece:
    """What becomes of the tokens of a request, the last of which ends it."""
    options = Options(len(tokens), stop_token_ids=frozenset(tokens[-1:]))
    request = Request([1], options, 0, lambda: False, None)
    for token in tokens[:-1]:
        request.push(Drawn(token), None)
    request.push(Drawn(tokens[-1]), "stop")

    async def collect() -> Piece:
        whole = Piece()
        async for piece in Choice(0, request, channels, stop).pieces():
            whole += piece
        return whole

    return asyncio.run(collect())


class Parser:
    """Does as `openai_harmony.StreamableParser` does, on the tests' tokenizer: the first five tokens are thought."""

    def __init__(self) -> None:
        self.seen, self.current_channel, self.current_recipient = 0, None, None
        self.last_content_delta: str | None = None
        self._tokenizer = chats.tokenizer()

    def process(self, token: int) -> None:
        self.seen += 1
        self.current_channel = "analysis" if self.seen <= 5 else "final"  # type: ignore[assignment]
        self.last_content_delta = self._tokenizer.decode([token], skip_special_tokens=True)


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_have_a_field_of_their_own(
    stream: bool, served: Served, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"model": NAME, "messages": [chats.user("hi")], "max_tokens": 12, "temperature": 0}
    text = client.chat.completions.create(**given).choices[0].message.content
    assert text is not None
    assert len(text) > 5
    monkeypatch.setattr(served.service, "channels", lambda: Harmony(Parser()))
    found = client.chat.completions.create(**given, stream=stream, logprobs=True)
    parts = [one.choices[0].delta for one in found] if stream else [found.choices[0].message]
    assert "".join(getattr(one, "reasoning_content", None) or "" for one in parts) == text[:5]
    assert "".join(one.content or "" for one in parts) == text[5:]
    if not stream:
        # Log-probabilities are of what is said.
        assert "".join(row.token for row in found.choices[0].logprobs.content) == text[5:]


def test_stop_strings_are_looked_for_in_what_is_said() -> None:
    ids = [*chats.tokenizer()("abcdeabcde")["input_ids"], 99]
    found = answered(Harmony(Parser()), ids, ["cd"])
    assert (found.reasoning, found.content, found.finish_reason) == ("abcde", "ab", "stop")
    assert answered(Plain(chats.tokenizer()), ids, ["cd"]).content == "ab"
    assert answered(Plain(chats.tokenizer()), ids, ["cda"]).content == "abcdeabcde"


def test_which_channels_there_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    assert isinstance(maker(chats.tokenizer(), None)(), Plain)
    assert isinstance(maker(chats.tokenizer(), False)(), Plain)
    pytest.importorskip("openai_harmony")
    with pytest.raises(ValueError, match="the tokenizer is not that of GPT-OSS"):
        maker(chats.tokenizer(), True)
    marked = SimpleNamespace(get_vocab=lambda: dict.fromkeys(MARKS, 0), convert_tokens_to_ids=lambda names: names)
    monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", str(tmp_path))
    with pytest.raises(ValueError, match="cannot read its vocabulary"):
        maker(marked, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert isinstance(maker(marked, None)(), Plain)
    with pytest.raises(ValueError, match="pip install openai-harmony"):
        maker(marked, True)


@pytest.mark.skipif("TIKTOKEN_ENCODINGS_BASE" not in os.environ, reason="the vocabulary of openai-harmony is not here")
def test_harmony() -> None:
    harmony = pytest.importorskip("openai_harmony")
    encoding = harmony.load_harmony_encoding(harmony.HarmonyEncodingName.HARMONY_GPT_OSS)

    def ids(text: str) -> list[int]:
        return list(encoding.encode(text, allowed_special="all"))

    tokenizer = SimpleNamespace(
        get_vocab=lambda: dict.fromkeys(MARKS, 0), convert_tokens_to_ids=lambda mark: ids(mark)[0]
    )
    make = maker(tokenizer, True)
    thought = "<|channel|>analysis<|message|>Hm é🎉<|end|><|start|>assistant"
    found = answered(make(), ids(f"{thought}<|channel|>final<|message|>So 🎉 it is.<|return|>"))
    assert (found.reasoning, found.content, found.finish_reason) == ("Hm é🎉", "So 🎉 it is.", "stop")
    call = '<|channel|>commentary to=functions.clock <|constrain|>json<|message|>{"zone": 1}<|call|>'
    found = answered(make(), ids(thought + call))
    assert (found.reasoning, found.content) == ("Hm é🎉", 'to=functions.clock {"zone": 1}')
    with pytest.raises(GenerationError, match="harmony format"):
        answered(make(), ids("<|channel|>final<|message|>one<|end|>two<|return|>"))
    wrong = SimpleNamespace(get_vocab=tokenizer.get_vocab, convert_tokens_to_ids=lambda mark: 1)
    with pytest.raises(ValueError, match="numbers"):
        maker(wrong, True)

"""Answers to the official client: the batcher's own tokens, whole and in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import openai
import pytest

from gptoss_opt import ContinuousBatcher
from tests.endpoint.served import NAME, Served
from tests.finetune import chats

TOKENIZER = chats.tokenizer()
PROMPTS = ["hello there", "what is it?", "2 + 2", "tell me more"]
COLUMNS = ("tokens", "text_offset", "token_logprobs", "top_logprobs")
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0}


def expected(model: Any, prompts: list[Any], length: int, **options: Any) -> list[list[int]]:
    """The batcher's tokens for prompts."""
    ids = [TOKENIZER(one)["input_ids"] if isinstance(one, str) else one for one in prompts]
    batcher = ContinuousBatcher(model)
    try:
        return batcher.generate(ids, max_new_tokens=length, progress=False, **{"do_sample": False, **options})
    finally:
        batcher.close()


def joined(tokens: Iterable[str]) -> str:
    """The text of tokens that are written one by one."""
    return "".join(token for token in tokens if token not in chats.SPECIAL)


def text(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens, skip_special_tokens=True)


def test_completions_are_those_of_the_batcher(model: Any, client: openai.OpenAI) -> None:
    wanted = expected(model, PROMPTS, 24)
    found = client.completions.create(prompt=PROMPTS, max_tokens=24, **GREEDY)
    assert [one.text for one in found.choices] == [text(tokens) for tokens in wanted]
    assert [one.index for one in found.choices] == [0, 1, 2, 3]
    assert len({one.text for one in found.choices}) == 4
    assert found.usage is not None
    assert found.usage.prompt_tokens == sum(len(one) for one in PROMPTS)
    assert found.usage.completion_tokens == sum(map(len, wanted))
    # Token ids are prompts too, one or several; and another model would say something else.
    ids = [TOKENIZER(one)["input_ids"] for one in PROMPTS]
    for prompt, several in ((ids, wanted), (ids[2], wanted[2:3]), (PROMPTS[1], wanted[1:2])):
        found = client.completions.create(prompt=prompt, max_tokens=24, **GREEDY)
        assert [one.text for one in found.choices] == [text(tokens) for tokens in several]
    weight = model.model.layers[0].self_attn.sinks
    before = weight.detach().clone()
    try:
        weight.data += 3
        found = client.completions.create(prompt=PROMPTS + ["x"], max_tokens=24, **GREEDY)
        assert [one.text for one in found.choices[:4]] != [text(tokens) for tokens in wanted]
    finally:
        weight.data.copy_(before)


def test_without_a_length_there_are_sixteen_tokens(client: openai.OpenAI) -> None:
    found = client.completions.create(model=NAME, prompt="hello", extra_body={"repetition_penalty": 1.3}, seed=1)
    assert found.usage is not None
    assert found.usage.completion_tokens == 16
    assert found.choices[0].finish_reason == "length"


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.9, "seed": 4, "n": 3}])
def test_pieces_of_a_stream_join_to_the_whole(options: dict[str, Any], client: openai.OpenAI) -> None:
    given = {"model": NAME, "prompt": PROMPTS[:2], "max_tokens": 40, "logprobs": 2, **options}
    whole = client.completions.create(**given)
    pieces = list(client.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    assert len(pieces) > 20
    for choice in whole.choices:
        mine = [one for piece in pieces for one in piece.choices if one.index == choice.index]
        assert "".join(one.text for one in mine) == choice.text
        assert [one.finish_reason for one in mine][-1] == choice.finish_reason
        assert all(one.finish_reason is None for one in mine[:-1])
        assert choice.logprobs is not None
        rows = [row for one in mine for row in zip(*map(one.logprobs.__getattribute__, COLUMNS), strict=True)]
        wanted = list(zip(*map(choice.logprobs.__getattribute__, COLUMNS), strict=True))
        assert [row[:2] for row in rows] == [row[:2] for row in wanted]
        assert [row[2] for row in rows] == pytest.approx([row[2] for row in wanted], abs=1e-5)
        assert [list(row[3]) for row in rows] == [list(row[3]) for row in wanted]
        assert all(choice.text[start:].startswith(token) for token, start, *_ in rows if token not in chats.SPECIAL)
        assert joined(row[0] for row in rows) == choice.text
    assert pieces[-1].usage == whole.usage
    assert all(piece.usage is None for piece in pieces[:-1])
    texts = {one.text for one in whole.choices}
    assert len(texts) == (6 if "n" in options else 2)


def test_a_seed_makes_the_same_draws_as_the_batcher(model: Any, client: openai.OpenAI) -> None:
    wanted = expected(model, PROMPTS[:1], 20, do_sample=True, temperature=0.8, top_k=0, top_p=0.7, seed=11)
    given = {"model": NAME, "prompt": PROMPTS[0], "max_tokens": 20, "temperature": 0.8, "top_p": 0.7}
    assert client.completions.create(**given, seed=11).choices[0].text == text(wanted[0])
    assert client.completions.create(**given, seed=12).choices[0].text != text(wanted[0])


def chat_prompt(*messages: dict[str, Any], **options: Any) -> list[int]:
    ids: list[int] = TOKENIZER.apply_chat_template(
        list(messages), add_generation_prompt=True, return_dict=True, **options
    )["input_ids"]
    return ids


def test_chats_are_put_into_the_template(model: Any, client: openai.OpenAI) -> None:
    messages = [chats.user("hello"), chats.assistant("what?"), chats.user("the time")]
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    prompts = [chat_prompt(*messages), chat_prompt(*messages, tools=tools)]
    plain, with_tools = expected(model, prompts, 30)
    assert plain != with_tools
    parts = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
    given: dict[str, Any] = {**GREEDY, "max_completion_tokens": 30}
    for asked, more, wanted in (
        (messages, {}, plain),
        (parts, {}, plain),
        (messages, {"tools": tools}, with_tools),
        (messages, {"tools": tools, "tool_choice": "none"}, plain),
    ):
        found = client.chat.completions.create(messages=asked, **given, **more)  # type: ignore[call-overload]
        assert found.choices[0].message.content == text(wanted)
        assert found.choices[0].message.role == "assistant"
    # Of a call that was made, the template gets the name, and arguments as an object.
    call = {"id": "1", "type": "function", "name": "clock", "function": {"name": "clock", "arguments": '{"a": 1}'}}
    called = [*messages[:1], {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "noon"}]
    (wanted,) = expected(model, [chat_prompt(*called)], 30)
    found = client.chat.completions.create(messages=called, **given)  # type: ignore[call-overload]
    assert found.choices[0].message.content == text(wanted)


def test_a_chat_goes_on_to_the_end_of_the_context(client: openai.OpenAI) -> None:
    prompt = chat_prompt(chats.user("hello"))
    given: dict[str, Any] = {"model": NAME, "messages": [chats.user("hello")], "seed": 2, "n": 2}
    found = client.chat.completions.create(**given)
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(prompt)
    assert 2 * 20 < found.usage.completion_tokens <= 2 * (512 - len(prompt))


def test_a_chat_in_a_stream(client: openai.OpenAI) -> None:
    given: dict[str, Any] = {**GREEDY, "messages": [chats.user("hello")], "max_tokens": 40}
    given |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**given)
    pieces = list(client.chat.completions.create(**given, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert len({piece.id for piece in pieces}) == 1
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
    rows = [row for piece in pieces if (found := piece.choices[0].logprobs) for row in found.content or []]
    assert whole.choices[0].logprobs is not None
    wanted = whole.choices[0].logprobs.content or []
    assert [row.token for row in rows] == [row.token for row in wanted]
    assert [row.logprob for row in rows] == pytest.approx([row.logprob for row in wanted], abs=1e-5)
    assert joined(row.token for row in wanted) == whole.choices[0].message.content
    # Greedy: each token is the likeliest.
    assert all(row.token == row.top_logprobs[0].token and len(row.top_logprobs) == 2 for row in wanted)
    assert all(bytes(row.bytes or []).decode() == row.token for row in wanted)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_it_and_are_left_out(stream: bool, client: openai.OpenAI) -> None:
    given: dict[str, Any] = {**GREEDY, "prompt": PROMPTS[0], "max_tokens": 60, "logprobs": 0}
    all_of_it = client.completions.create(**given).choices[0].text
    stop = all_of_it[10:13]  # three tokens
    cut = all_of_it.index(stop)

    def answer(stops: Any) -> tuple[str, str | None, str]:
        found = client.completions.create(**given, stop=stops, stream=stream)
        choices = [one.choices[0] for one in found] if stream else [found.choices[0]]
        tokens = [token for one in choices for token in one.logprobs.tokens]
        return "".join(one.text for one in choices), choices[-1].finish_reason, joined(tokens)

    for stops in (stop, ["nowhere to be found", stop]):
        assert answer(stops) == (all_of_it[:cut], "stop", all_of_it[:cut])
    assert answer(stop[:2] + "\x0b")[0] == all_of_it


def test_sixty_four_clients_at_once(model: Any, served: Served) -> None:
    prompts = [f"client {number} asks {PROMPTS[number % 4]}" for number in range(64)]
    wanted = [text(tokens) for tokens in expected(model, prompts, 20)]
    assert len(set(wanted)) > 32

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:

            async def one(number: int) -> str:
                given = {**GREEDY, "prompt": prompts[number], "max_tokens": 20}
                if number % 2:
                    return (await client.completions.create(**given)).choices[0].text
                return "".join(
                    [piece.choices[0].text async for piece in await client.completions.create(**given, stream=True)]
                )

            return await asyncio.gather(*map(one, range(64)))

    assert asyncio.run(ask()) == wanted
    assert not served.service.open

"""What is refused, and how; and what happens to those who hang up or come too many."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gptoss_opt.endpoint import create_app
from tests.endpoint.served import NAME, Served, held_up, serving, slowed, until
from tests.finetune import chats

ASKED: dict[str, Any] = {"model": NAME, "prompt": "hello", "max_tokens": 8, "temperature": 0}
CHAT: dict[str, Any] = {"model": NAME, "messages": [chats.user("hello")], "max_tokens": 8}


def post(url: str, body: Any, route: str = "completions", **headers: str) -> httpx2.Response:
    content = body if isinstance(body, str) else json.dumps(body)
    headers = {"Content-Type": "application/json", **headers}
    return httpx2.post(f"{url}/v1/{route}", content=content, headers=headers, timeout=30)


@pytest.mark.parametrize(
    ("more", "status", "param", "code", "said"),
    [
        ({"model": "other"}, 404, "model", "model_not_found", "there is no model 'other' here, only 'small'"),
        ({"prompt": "x" * 600}, 400, "prompt", "context_length_exceeded", "512 tokens, and the prompt has 600"),
        ({"max_tokens": 508}, 400, "prompt", "context_length_exceeded", "the prompt has 5 and the completion 508"),
        ({"prompt": ""}, 400, "prompt", None, "has no tokens"),
        ({"prompt": [1, 4000]}, 400, "prompt", None, "the prompt holds the id 4000"),
        ({"prompt": {"a": 1}}, 400, "prompt", None, "should be a valid"),
        ({"max_tokens": 0}, 400, "max_tokens", None, "greater than or equal to 1"),
        ({"temperature": "hot"}, 400, "temperature", None, "valid number"),
        ({"temperature": 3}, 400, "temperature", None, "less than or equal to 2"),
        ({"n": 2}, 400, "n", None, "with a temperature of 0 all completions are the same"),
        ({"n": 100, "temperature": 1}, 400, "n", None, "100 completions are asked for, and the server takes"),
        ({"echo": True}, 400, "echo", None, "is not implemented. Leave it out, or give False"),
        ({"logit_bias": {"1": 2}}, 400, "logit_bias", None, "is not implemented"),
        ({"stop": [""]}, 400, "stop", None, "at least 1 character"),
        ({"tempreature": 1}, 400, "tempreature", None, "not permitted"),
        ({"stream_options": {"what": 1}}, 400, "stream_options", None, "not permitted"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_requests(
    more: dict[str, Any], status: int, param: str, code: str | None, said: str, served: Served
) -> None:
    found = post(served.url, {**ASKED, **more, "stream": True})
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert said in error["message"]
    # Without what is wrong it is taken.
    assert post(served.url, ASKED).status_code == 200


@pytest.mark.parametrize(
    ("more", "param", "said"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages", "'user'"),
        ({"messages": [chats.user("x"), chats.assistant("<|end|>")]}, "messages", "no tags, please"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "'text'"),
        ({"messages": [chats.assistant("", tool_calls=[{"function": {"arguments": "{"}}])]}, "messages", "no JSON"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "up to the server"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs to be true"),
        ({"tool_choice": "required"}, "tool_choice", "'auto' or 'none'"),
        ({"response_format": {"type": "json_object"}}, "response_format", "is not implemented"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_chats(more: dict[str, Any], param: str, said: str, served: Served) -> None:
    found = post(served.url, {**CHAT, **more}, "chat/completions")
    assert found.status_code == 400, found.text
    assert found.json()["error"]["param"] == param
    assert said in found.json()["error"]["message"]
    assert post(served.url, {**CHAT, "user": "me", "presence_penalty": 0}, "chat/completions").status_code == 200


def test_what_is_no_request_at_all(served: Served) -> None:
    assert "the body is no JSON" in post(served.url, "{what").json()["error"]["message"]
    assert post(served.url, "[]").json()["error"]["type"] == "invalid_request_error"
    for method, route, status in (("GET", "/v1/completions", 405), ("GET", "/what", 404)):
        found = httpx2.request(method, served.url + route)
        assert found.status_code == status
        assert route in found.json()["error"]["message"]


def test_the_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length") as found:
        client.completions.create(**{**ASKED, "prompt": "x" * 600})
    assert found.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert [one.id for one in client.models.list()] == [client.models.retrieve(NAME).id] == [NAME]


def test_a_tokenizer_without_a_chat_template(model: Any) -> None:
    with serving(model, chats.tokenizer(None)) as served:
        assert "no chat template" in post(served.url, CHAT, "chat/completions").json()["error"]["message"]


def test_a_prompt_that_the_pages_cannot_hold(model: Any) -> None:
    with serving(model, kv_memory=40_000) as served:
        found = post(served.url, {**ASKED, "prompt": "x" * 4000}).json()["error"]
        assert found["code"] == "context_length_exceeded"
        assert "pages" in found["message"]


def test_keys(model: Any) -> None:
    with serving(model, api_key="secret") as served:
        for key in ("other", "secre", "Secret"):
            found = post(served.url, ASKED, Authorization=f"Bearer {key}")
            assert found.status_code == 401
            assert found.json()["error"]["code"] == "invalid_api_key"
        assert post(served.url, ASKED).status_code == 401
        assert httpx2.get(f"{served.url}/v1/models").status_code == 401
        assert httpx2.get(f"{served.url}/health").json() == {"status": "ok"}
        with served.client(api_key="secret") as client:
            assert client.completions.create(**ASKED).choices


def test_metrics(served: Served, client: openai.OpenAI) -> None:
    def read() -> dict[str, float]:
        found = httpx2.get(f"{served.url}/metrics")
        assert found.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        families = text_string_to_metric_families(found.text)
        return {sample.name: sample.value for family in families for sample in family.samples}

    before = read()
    usage = client.completions.create(**ASKED).usage
    made = usage.completion_tokens if usage else 0
    assert made
    # The last token is counted after it is handed out.
    until(lambda: read()["gptoss_opt_tokens_out_total"] == before["gptoss_opt_tokens_out_total"] + made)
    after = read()
    assert after["gptoss_opt_finished_total"] == before["gptoss_opt_finished_total"] + 1
    assert after["gptoss_opt_running"] == 0


def test_too_many_are_refused(model: Any) -> None:
    with serving(model, max_num_sequences=2, max_waiting=3) as served, served.client() as client:
        with held_up(model):
            there = [threading.Thread(target=client.completions.create, kwargs=ASKED) for _ in range(5)]
            for one in there:
                one.start()
            until(lambda: len(served.service.open) == 5)
            found = post(served.url, ASKED)
            assert found.status_code == 429
            assert found.headers["Retry-After"] == "1"
            assert found.json()["error"]["type"] == "rate_limit_error"
            with pytest.raises(openai.RateLimitError):
                client.completions.create(**ASKED)
        for one in there:
            one.join()
        assert client.completions.create(**ASKED).choices
        assert served.service.batcher.stats().finished == 6


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_who_hangs_up_cancels(stream: bool, n: int, model: Any) -> None:
    slow = slowed(model, 0.005)
    try:
        with serving(model) as served:
            stats = served.service.batcher.stats
            body = json.dumps({**ASKED, "max_tokens": 4000, "temperature": 1, "n": n, "stream": stream, "seed": 3})
            fields = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            head = f"POST /v1/completions HTTP/1.1\r\n{fields}\r\n\r\n"
            address = urlsplit(served.url)
            with socket.create_connection((address.hostname, address.port)) as connection:
                connection.sendall((head + body).encode())
                until(lambda: stats().tokens_out > 5)
                assert stats().running >= 1
                assert stats().finished < n
            until(lambda: not stats().running)
            until(lambda: not served.service.open)
            assert stats().finished == n
            assert stats().tokens_out < 2000
            # Others are served on.
            assert post(served.url, ASKED).status_code == 200
    finally:
        slow.remove()


def test_a_step_that_fails_is_told_and_the_server_is_not_healthy(model: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no more")

    with serving(model) as served:
        hook = model.register_forward_pre_hook(fail)
        try:
            found = post(served.url, ASKED)
            assert found.status_code == 500
            assert found.json()["error"]["type"] == "server_error"
            assert "no more" in found.json()["error"]["message"]
        finally:
            hook.remove()
        assert httpx2.get(f"{served.url}/health").status_code == 503
        assert post(served.url, ASKED).status_code == 500
        with served.client() as client, pytest.raises(openai.APIError, match="batcher is closed"):
            list(client.completions.create(**ASKED, stream=True))


@pytest.mark.parametrize(
    ("options", "said"), [({"context": 10**9}, "context is"), ({"max_waiting": -1}, "max_waiting")]
)
def test_options_that_cannot_be(options: dict[str, Any], said: str, model: Any) -> None:
    with pytest.raises(ValueError, match=said):
        create_app(model, chats.tokenizer(), **options)


def test_a_model_that_several_ranks_hold_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoss_opt.endpoint.app.mesh_of", lambda model: object())
    with pytest.raises(ValueError, match="several ranks"):
        create_app(model, chats.tokenizer())

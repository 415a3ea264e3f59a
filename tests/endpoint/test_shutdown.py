"""How a server ends: what goes on is finished, within limits; and the command that starts one."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

import gptoss_opt.endpoint
from gptoss_opt import cli
from tests.endpoint.served import NAME, held_up, serving, slowed, until
from tests.finetune import chats

ASKED: dict[str, Any] = {"model": NAME, "prompt": "hello", "max_tokens": 10, "temperature": 0}


def test_what_goes_on_is_finished_and_no_more_is_taken(model: Any) -> None:
    with serving(model) as served, served.client() as client, served.client() as another:
        wanted = client.completions.create(**ASKED).choices[0].text
        made: list[str] = []

        def ask() -> None:
            made.append("".join(piece.choices[0].text for piece in client.completions.create(**ASKED, stream=True)))

        with held_up(model):
            asking = threading.Thread(target=ask)
            asking.start()
            until(lambda: served.service.open)
            served.server.handle_exit(signal.SIGTERM, None)
            with pytest.raises(openai.InternalServerError) as found:
                another.completions.create(**ASKED)
            assert (found.value.status_code, found.value.code) == (503, "shutting_down")
            assert httpx2.get(f"{served.url}/health").status_code == 503
            assert not served.server.should_exit
        asking.join()
        assert made == [wanted]
        until(lambda: served.server.should_exit)


@pytest.mark.parametrize(("timeout", "signals"), [(0.0, 1), (600.0, 2)])
def test_what_takes_too_long_is_cancelled_and_told(timeout: float, signals: int, model: Any) -> None:
    slow = slowed(model, 0.02)
    try:
        with serving(model, shutdown_timeout=timeout) as served, served.client() as client:
            given = {**ASKED, "max_tokens": 4000, "temperature": 1, "seed": 3}
            stream = client.completions.create(**given, stream=True)
            next(iter(stream))
            for _ in range(signals):
                served.server.handle_exit(signal.SIGTERM, None)
            with pytest.raises(openai.APIError, match="shutting down"):
                list(stream)
            until(lambda: served.server.should_exit)
    finally:
        slow.remove()


def test_the_command(tmp_path: Path) -> None:
    path = str(chats.checkpoint(tmp_path / NAME))
    command = [sys.executable, "-m", "gptoss_opt", "serve", path, "--port", "0", "--context", "2048"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = address(process)
            with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
                assert [one.id for one in client.models.list()] == [NAME]
                stream = client.completions.create(**{**ASKED, "max_tokens": 100}, stream=True)
                first = next(iter(stream))
                process.send_signal(signal.SIGTERM)
                last = [first, *stream][-1]
                assert last.choices[0].finish_reason in ("stop", "length")
            assert process.stderr is not None
            assert "Traceback" not in process.stderr.read()
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()


def test_ctrl_c_is_raised_at_the_end(model: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said: list[str] = []

    def ask_and_stop() -> None:
        try:
            url = f"http://127.0.0.1:{port}"
            until(lambda: answers(url))
            with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
                said.append(client.completions.create(**ASKED).choices[0].text)
        finally:
            signal.raise_signal(signal.SIGINT)

    asking = threading.Thread(target=ask_and_stop)
    asking.start()
    with pytest.raises(KeyboardInterrupt):
        gptoss_opt.endpoint.run(model, chats.tokenizer(), port=port, name=NAME)
    asking.join()
    assert len(said) == 1


def answers(url: str) -> bool:
    """Whether a server answers there."""
    try:
        return httpx2.get(f"{url}/health", timeout=30).status_code == 200
    except httpx2.ConnectError:
        return False


def address(process: subprocess.Popen[str]) -> str:
    """Where a server that starts says it serves; once it answers."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"is served at (http://[\d.:]+)", line):
            until(lambda: answers(found[1]))
            return found[1]
    raise AssertionError("".join(said))


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of the calls of `run`, which does nothing."""
    calls: list[dict[str, Any]] = []

    def run(model: Any, tokenizer: Any, **options: Any) -> None:
        assert model.config.vocab_size == 128
        assert tokenizer.chat_template
        calls.append(options)

    monkeypatch.setattr(gptoss_opt.endpoint, "run", run)
    return calls


def test_the_code_does_the_same(
    tmp_path: Path,
    given: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = str(chats.checkpoint(tmp_path / "some model"))
    monkeypatch.setenv("GPTOSS_OPT_API_KEY", "sk-hidden")
    command = ["serve", path, "--context", "256", "--max-waiting", "3", "--port", "0", "--no-harmony"]
    assert cli.main(command) == 0
    assert cli.main([*command, "--show-code"]) == 0
    code = capsys.readouterr().out
    assert "sk-hidden" not in code
    exec(code, {})
    first, second = given
    assert first == second
    assert first["name"] == "some model"
    assert (first["api_key"], first["context"], first["max_waiting"]) == ("sk-hidden", 256, 3)
    assert first["harmony"] is False


def test_mistakes_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(chats.checkpoint(tmp_path / NAME))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", path, "--port", str(port), "--context", "256"]) == 2
    assert f"nothing can listen on 127.0.0.1, port {port}" in capsys.readouterr().err
    assert cli.main(["serve", path, "--context", "10000000"]) == 2
    monkeypatch.delitem(sys.modules, "gptoss_opt.endpoint")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    capsys.readouterr()
    assert cli.main(["serve", path]) == 2
    assert capsys.readouterr().err == 'gptoss-opt: the endpoint needs fastapi: pip install "gptoss-opt[serve]".\n'

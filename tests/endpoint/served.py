"""A server in a thread, over a model whose steps can be held up."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import openai
import uvicorn

from gptoss_opt import load
from gptoss_opt.endpoint import create_app
from gptoss_opt.endpoint.server import Server
from gptoss_opt.endpoint.service import Service
from tests.finetune import chats

NAME = "small"


class Served(NamedTuple):
    """A server that runs, what it shares, and its address."""

    server: Server
    service: Service
    url: str

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "any", "max_retries": 0, **options})


def loaded(folder: Path) -> Any:
    return load(chats.checkpoint(folder))


@contextmanager
def serving(model: Any, tokenizer: Any = None, *, shutdown_timeout: float = 10.0, **options: Any) -> Iterator[Served]:
    """A server in a thread, which ends with the block."""
    app = create_app(model, tokenizer or chats.tokenizer(), name=NAME, **options)
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
    server = Server(app.state.service, config, shutdown_timeout=shutdown_timeout)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: server.started)
        yield Served(server, app.state.service, f"http://127.0.0.1:{listener.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def until(found: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until something holds. Fails after some seconds."""
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


@contextmanager
def held_up(model: Any) -> Iterator[threading.Event]:
    """Forwards of the model wait for an event, which is set at the end of the block."""
    going = threading.Event()

    def wait(*_: Any) -> None:
        going.wait()

    hook = model.register_forward_pre_hook(wait)
    try:
        yield going
    finally:
        going.set()
        hook.remove()


def slowed(model: Any, seconds: float) -> Any:
    """Forwards of the model take so long at least, until `remove()` is called on what is returned."""
    return model.register_forward_pre_hook(lambda *_: time.sleep(seconds))

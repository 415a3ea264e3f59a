"""`run`: the application on uvicorn, which ends when its work is done."""

from __future__ import annotations

import logging
import signal
import socket
import time
from types import FrameType
from typing import Any

import uvicorn
from torch import nn

from .app import create_app
from .service import Service

LAST_WORDS = 5
"""Seconds that answers may take to reach their clients once all that goes on was cancelled."""

logger = logging.getLogger("uvicorn.error")


class Server(uvicorn.Server):
    """A server that on SIGTERM or Ctrl-C takes no more work, and ends when what goes on is done.

    A second signal cancels what goes on; a third ends it at once.

    Args:
        service: takes the work.
        config: of uvicorn.
        shutdown_timeout: after how many seconds what goes on is cancelled.

    Attributes:
        signals: those that came.
    """

    def __init__(self, service: Service, config: uvicorn.Config, *, shutdown_timeout: float) -> None:
        super().__init__(config)
        self.signals: list[int] = []
        self._service, self._timeout, self._deadline = service, shutdown_timeout, float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.signals.append(sig)
        if len(self.signals) > 2:
            super().handle_exit(sig, frame)
            self.force_exit = True
        self._service.draining = True
        self._deadline = time.monotonic() + (self._timeout if len(self.signals) == 1 else 0)

    async def on_tick(self, counter: int) -> bool:
        """What uvicorn asks ten times a second: whether to end."""
        if self._service.draining:
            late = time.monotonic() >= self._deadline
            if late:
                self._service.cancel()
            self.should_exit |= late or not self._service.open
        return await super().on_tick(counter)


def run(
    model: nn.Module,
    tokenizer: Any,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    shutdown_timeout: float = 30.0,
    **options: Any,
) -> None:
    """Serve a model until SIGTERM or Ctrl-C; then finish what goes on, and return.

    Args:
        model, tokenizer: see `create_app`.
        host, port: where to listen; port 0 is any that is free.
        shutdown_timeout: how many seconds what goes on may take to finish; what is left then is cancelled.
        options: those of `create_app`.

    Raises:
        KeyboardInterrupt: it was Ctrl-C that ended it.
        ValueError: nothing can listen there; or see `create_app`.
        CompatibilityError: see `create_app`.
    """
    app = create_app(model, tokenizer, **options)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ValueError(f"nothing can listen on {host}, port {port} ({error}). Choose another.") from error
    config = uvicorn.Config(app, timeout_graceful_shutdown=LAST_WORDS)
    service: Service = app.state.service
    server = Server(service, config, shutdown_timeout=shutdown_timeout)
    shown = f"[{host}]" if ":" in host else host
    with listener:
        logger.info("%s is served at http://%s:%s/v1", service.name, shown, listener.getsockname()[1])
        server.run(sockets=[listener])
    if server.signals and server.signals[0] == signal.SIGINT:
        raise KeyboardInterrupt

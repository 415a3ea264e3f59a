"""`create_app`: one batcher and the routes over it, as an ASGI application."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from torch import nn

from ..core import mesh_of
from ..serve import ContinuousBatcher
from . import errors, routes
from .channels import maker
from .service import Service


def create_app(
    model: nn.Module,
    tokenizer: Any,
    *,
    name: str | None = None,
    context: int | None = None,
    max_waiting: int = 256,
    max_num_sequences: int = 64,
    api_key: str | None = None,
    harmony: bool | None = None,
    **batcher: Any,
) -> FastAPI:
    """An ASGI application that serves a model as OpenAI's API does. It is started once, by uvicorn or another server.

    Args:
        model: a GptOssForCausalLM, with the wrappers it has.
        tokenizer: that of the model.
        name: what clients call the model; the name that it was loaded by if left out.
        context: how many tokens a prompt and its completion may have together; what the model allows if left out.
        max_waiting: how many completions may wait beside those that are made. More are refused with status 429.
        max_num_sequences: how many completions are made at once.
        api_key: what clients must send as `Authorization: Bearer KEY`; nothing if left out.
        harmony: whether openai-harmony tells thoughts from answers; if left out, where it is installed and the
            tokenizer is that of GPT-OSS.
        batcher: more options of `ContinuousBatcher`.

    Returns:
        The application. While it runs a thread makes the steps; when it ends, what goes on is ended.

    Raises:
        CompatibilityError: the model cannot be served, and why.
        ValueError: an option makes no sense, or several ranks hold the model.

    Example:
        >>> app = create_app(model, tokenizer=None, name="tiny", max_num_sequences=4, harmony=False)
        >>> sorted(app.openapi()["paths"])[:3]
        ['/health', '/metrics', '/v1/chat/completions']
    """
    config: Any = model.config
    allowed = config.max_position_embeddings
    if mesh_of(model) is not None:
        raise ValueError("several ranks hold the model, and the endpoint serves one process. Use ContinuousBatcher.")
    if context is not None and not 1 < context <= allowed:
        raise ValueError(f"context is {context}, and must be from 2 to {allowed}, which the model allows.")
    if max_waiting < 0:
        raise ValueError(f"max_waiting is {max_waiting}, and must be at least 0.")
    channels = maker(tokenizer, harmony)
    service = Service(
        ContinuousBatcher(model, max_num_sequences=max_num_sequences, **batcher),
        tokenizer,
        name=name or Path(config.name_or_path or "model").name,
        context=context or allowed,
        max_num_sequences=max_num_sequences,
        max_waiting=max_waiting,
        channels=channels,
        api_key=api_key,
        created=int(time.time()),
    )

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        with service.batcher:
            yield
            service.batcher.close()

    app = FastAPI(title="gptoss_opt", lifespan=running)
    app.state.service = service
    errors.install(app)
    app.include_router(routes.outside)
    app.include_router(routes.inside)
    return app

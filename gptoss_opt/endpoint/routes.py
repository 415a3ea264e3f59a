"""All routes: those here are short, and completions have files of their own."""

from __future__ import annotations

import hmac

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import PlainTextResponse

from . import chat, completions
from .answers import Json
from .errors import ApiError
from .service import Service, service_of

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
"""The content type of Prometheus' text format."""


def _check_key(http: HttpRequest) -> None:
    key, given = service_of(http).api_key, http.headers.get("Authorization", "")
    if key is not None and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
        message = "the API key is missing or wrong. Send it as Authorization: Bearer KEY."
        headers = {"WWW-Authenticate": "Bearer"}
        raise ApiError(message, status=401, code="invalid_api_key", headers=headers)


outside = APIRouter()
"""Routes for those who run the server: they need no key."""
inside = APIRouter(prefix="/v1", dependencies=[Depends(_check_key)])
"""Routes for clients."""


@outside.get("/health")
def health(http: HttpRequest) -> Json:
    """Whether requests are taken; if not, status 503."""
    service = service_of(http)
    if service.batcher.closed:
        raise ApiError("a step of the batcher failed. Start the server again.", status=503, code="failed")
    if service.draining:
        raise ApiError("the server is shutting down.", status=503, code="shutting_down")
    return {"status": "ok"}


@outside.get("/metrics")
def metrics(http: HttpRequest) -> PlainTextResponse:
    """The numbers of `ContinuousBatcher.stats`, for Prometheus."""
    return PlainTextResponse(service_of(http).batcher.stats().prometheus(), media_type=PROMETHEUS)


@inside.get("/models")
def models(http: HttpRequest) -> Json:
    """The one model there is, in a list."""
    return {"object": "list", "data": [_described(service_of(http))]}


@inside.get("/models/{name:path}")
def model(name: str, http: HttpRequest) -> Json:
    """The one model there is."""
    service_of(http).check_model(name)
    return _described(service_of(http))


def _described(service: Service) -> Json:
    about = {"id": service.name, "object": "model", "created": service.created, "owned_by": "gptoss_opt"}
    return {**about, "max_model_len": service.context}


inside.include_router(completions.router)
inside.include_router(chat.router)

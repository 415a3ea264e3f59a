"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..serve import GenerationError


class ApiError(Exception):
    """What a client is told went wrong.

    Attributes:
        message: says what is wrong, and what to do.
        status: the HTTP status.
        param: the field of the request that is wrong, or None.
        code: a word for programs, such as "context_length_exceeded", or None.
        headers: of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code, self.headers = message, status, param, code, headers

    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body(), self.status, dict(self.headers or {}))


TYPES = {429: "rate_limit_error"}
"""The types of errors, by HTTP status, that are neither the client's mistake nor the server's."""


def of_validation(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """The error for what pydantic found wrong in a body. The first field with a problem is its `param`."""
    if problems[0]["type"] == "json_invalid":
        return ApiError(f"the body is no JSON: {problems[0]['ctx']['error']}.")
    found: dict[str, list[str]] = {}
    for one in problems:
        place = [str(part) for part in one["loc"][1:]]
        found.setdefault(one.get("ctx", {}).get("param") or (place[0] if place else "body"), []).append(one["msg"])
    first = next(iter(found))
    message = "; ".join(f"{name}: {', or '.join(dict.fromkeys(said))}" for name, said in found.items())
    return ApiError(f"{message}.", param=None if first == "body" else first)


def told(error: ApiError | GenerationError) -> ApiError:
    """What a client is told of a completion that could not be made."""
    return error if isinstance(error, ApiError) else ApiError(str(error), status=500, code="generation_failed")


def install(app: FastAPI) -> None:
    """Let an app answer every error in this shape."""

    @app.exception_handler(ApiError)
    async def _ours(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(GenerationError)
    async def _failed(_: Request, error: GenerationError) -> JSONResponse:
        return told(error).response()

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return of_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(message, status=error.status_code, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def _unforeseen(_: Request, error: Exception) -> JSONResponse:
        # The server logs it with its trace.
        return ApiError("the server failed on this request; its log says why.", status=500).response()

"""`POST /v1/completions`: prompts as texts or token ids."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from .answers import Form, Json, answer
from .channels import Plain
from .choices import Piece
from .schemas import CompletionBody
from .service import service_of

DEFAULT_LENGTH = 16
"""How many tokens a completion has where nothing is said: OpenAI's number."""

router = APIRouter()


@router.post("/completions")
async def completions(body: CompletionBody, http: HttpRequest) -> Response:
    """Complete one prompt or several."""
    service = service_of(http)
    service.check_model(body.model)
    prompts = await service.aside(prompts_of, body.prompt, service.tokenizer)
    work = service.submit(
        prompts,
        max_tokens=body.max_tokens or DEFAULT_LENGTH,
        sampling=body.sampling,
        stop=body.stop_strings,
        logprobs=body.logprobs,
        channels=lambda: Plain(service.tokenizer),
        param="prompt",
    )
    form = CompletionForm(service.tokenizer, body.logprobs is not None)
    return await answer(http, work, form, stream=bool(body.stream), with_usage=body.usage_in_stream)


def prompts_of(prompt: str | list[Any], tokenizer: Any) -> list[list[int]]:
    """The token ids of the prompts that a body holds."""
    several = prompt if isinstance(prompt, list) and not all(isinstance(one, int) for one in prompt) else [prompt]
    return [tokenizer(one)["input_ids"] if isinstance(one, str) else one for one in several]


class CompletionForm(Form):
    """What the choices of completions look like."""

    prefix = "cmpl"
    kind = kind_of_chunk = "text_completion"

    def first(self) -> None:
        return None

    def whole(self, piece: Piece) -> Json:
        return {"text": piece.content, "logprobs": self._logprobs(piece) if self.with_logprobs else None}

    def chunk(self, piece: Piece) -> Json:
        return self.whole(piece)

    def _logprobs(self, piece: Piece) -> Json:
        rows = [one for _, one in piece.logprobs]
        return {
            "tokens": [self.text(one.token) for one in rows],
            "token_logprobs": [one.logprob for one in rows],
            "top_logprobs": [{self.text(token): value for token, value in one.likeliest} for one in rows],
            "text_offset": [start for start, _ in piece.logprobs],
        }

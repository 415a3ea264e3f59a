"""`POST /v1/chat/completions`: messages, put into the tokenizer's chat template."""

from __future__ import annotations

import json
from inspect import signature
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from ..serve import Logprobs
from .answers import Form, Json, answer
from .choices import Piece
from .errors import ApiError
from .schemas import ChatBody, Message
from .service import service_of

router = APIRouter()


@router.post("/chat/completions")
async def chat(body: ChatBody, http: HttpRequest) -> Response:
    """Say what the assistant says next."""
    service = service_of(http)
    service.check_model(body.model)
    prompt = await service.aside(prompt_of, body, service.tokenizer)
    work = service.submit(
        [prompt],
        max_tokens=body.max_completion_tokens or body.max_tokens,
        sampling=body.sampling,
        stop=body.stop_strings,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        channels=service.channels,
        param="messages",
    )
    form = ChatForm(service.tokenizer, bool(body.logprobs))
    return await answer(http, work, form, stream=bool(body.stream), with_usage=body.usage_in_stream)


def prompt_of(body: ChatBody, tokenizer: Any) -> list[int]:
    """The token ids of a chat, up to where the assistant speaks. Raises `ApiError` if the template refuses it."""
    if tokenizer.chat_template is None:
        raise ApiError("the tokenizer has no chat template. Use /v1/completions.", param="messages")
    effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    if own := sorted(set(body.chat_template_kwargs) & set(signature(tokenizer.apply_chat_template).parameters)):
        message = f"{', '.join(own)} is no variable of a template, and up to the server. Leave it out."
        raise ApiError(message, param="chat_template_kwargs")
    messages = [for_template(one) for one in body.messages]
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            messages,
            tools=body.tools if body.tool_choice != "none" else None,
            add_generation_prompt=True,
            return_dict=True,
            **{**effort, **body.chat_template_kwargs},
        )["input_ids"]
    except Exception as error:
        # Templates are programs of the checkpoint's: what they raise for a chat that they do not take is theirs.
        raise ApiError(f"the chat template refuses the messages: {error}", param="messages") from error
    return ids


def for_template(message: Message) -> Json:
    """A message as chat templates know it: one text, calls with arguments as objects, and thoughts under both names."""
    given = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        given["content"] = "".join(part.text for part in message.content)
    if message.role == "assistant" and (thought := given.get("reasoning_content")):
        given.setdefault("thinking", thought)
    if calls := given.get("tool_calls"):
        given["tool_calls"] = [_with_arguments(call) for call in calls]
    return given


def _with_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except ValueError as error:
        raise ApiError(f"the arguments of a tool call are no JSON: {error}", param="messages") from error


class ChatForm(Form):
    """What the choices of chats look like."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    kind_of_chunk = "chat.completion.chunk"

    def first(self) -> Json:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def whole(self, piece: Piece) -> Json:
        thought = {"reasoning_content": piece.reasoning} if piece.reasoning else {}
        message = {"role": "assistant", "content": piece.content, "refusal": None, **thought}
        return {"message": message, "logprobs": self._logprobs(piece)}

    def chunk(self, piece: Piece) -> Json:
        parts = {"content": piece.content, "reasoning_content": piece.reasoning}
        return {"delta": {name: text for name, text in parts.items() if text}, "logprobs": self._logprobs(piece)}

    def _logprobs(self, piece: Piece) -> Json | None:
        if not self.with_logprobs:
            return None
        return {"content": [self._of_token(one) for _, one in piece.logprobs], "refusal": None}

    def _of_token(self, one: Logprobs) -> Json:
        likeliest = [self._written(token, value) for token, value in one.likeliest]
        return {**self._written(one.token, one.logprob), "top_logprobs": likeliest}

    def _written(self, token: int, logprob: float) -> Json:
        text = self.text(token)
        # A part of a character has no text, and a tokenizer does not tell its bytes.
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

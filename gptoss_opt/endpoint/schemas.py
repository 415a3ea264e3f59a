"""What clients may ask for: OpenAI's fields, and those of sampling that this package has beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

WITHOUT_EFFECT = (
    # Fields for OpenAI's own bookkeeping, which this server does not have.
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)

NEUTRAL: Mapping[str, Any] = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "logit_bias": {},
    "modalities": ["text"],
    "parallel_tool_calls": True,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "suffix": "",
}
"""Fields that are not implemented, with the value under which each does nothing. None does nothing either."""

Text = Annotated[str, Field(min_length=1)]


class StreamOptions(BaseModel):
    """What a stream has beside its text."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Body(BaseModel):
    """The fields that both kinds of completions have. What is left out has OpenAI's default."""

    model_config = ConfigDict(extra="forbid")
    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: int | None = None
    stop: Text | list[Text] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Beside OpenAI's own:
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_does_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, neutral in NEUTRAL.items():
            if given.get(name) not in (None, neutral):
                said = f"is not implemented. Leave it out, or give {neutral!r}"
                raise PydanticCustomError("not_implemented", said, {"param": name})
        return {name: value for name, value in given.items() if name not in WITHOUT_EFFECT and name not in NEUTRAL}

    @model_validator(mode="after")
    def _draws_where_there_are_several(self) -> Body:
        if (self.n or 1) > 1 and self.temperature == 0:
            said = "with a temperature of 0 all completions are the same. Ask for one, or raise the temperature"
            raise PydanticCustomError("same", said, {"param": "n"})
        return self

    @property
    def stop_strings(self) -> list[str]:
        """The strings that end a completion."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def usage_in_stream(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def sampling(self) -> dict[str, Any]:
        """Options of `ContinuousBatcher.submit`, apart from lengths and log-probabilities."""
        temperature = 1.0 if self.temperature is None else self.temperature
        return {
            "do_sample": temperature > 0,
            "temperature": temperature,
            "top_p": self.top_p or 1.0,
            "top_k": self.top_k or 0,
            "min_p": self.min_p or 0.0,
            "repetition_penalty": self.repetition_penalty or 1.0,
            "num_return_sequences": self.n or 1,
            "seed": self.seed,
        }


class CompletionBody(Body):
    """The body of `POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class Part(BaseModel):
    """A part of a message: text is all that the model reads."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat. Fields beside these go to the chat template as they are."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None


class ChatBody(Body):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _has_logprobs_where_the_likeliest_are_asked_for(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("alone", "needs logprobs to be true", {"param": "top_logprobs"})
        return self

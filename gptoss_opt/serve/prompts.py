"""Makes requests of what the user gives: prompts become token ids, and what cannot be done is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig

from .options import Options, is_id
from .request import Request

Prompt = str | Sequence[int] | torch.Tensor | Mapping[str, Any]


class TooLongError(ValueError):
    """A prompt and what is to follow it are more tokens than the model or the pages hold."""


def unpadded(encoded: Mapping[str, Any]) -> list[Any]:
    """The rows of token ids that a tokenizer returned, without padding; a single row of ids is one too."""

    def rows_of(value: Any) -> list[Any]:
        value = value.tolist() if hasattr(value, "tolist") else list(value)
        rows = [row.tolist() if hasattr(row, "tolist") else row for row in value]
        return rows if rows and isinstance(rows[0], Sequence) else [rows]

    ids = rows_of(encoded["input_ids"])
    if encoded.get("attention_mask") is None:
        return ids
    masks = rows_of(encoded["attention_mask"])
    return [[one for one, seen in zip(row, mask, strict=True) if seen] for row, mask in zip(ids, masks, strict=True)]


@dataclass(frozen=True)
class RequestBuilder:
    """Makes requests of what the user gives, for one model and its pages.

    Attributes:
        model: the one that completes; its `generation_config` is for what a request leaves open.
        max_tokens: how many tokens a prompt and its completion may have together.
        why_never: gives the reason why so many tokens never fit into the pages, or None.
    """

    model: Any
    max_tokens: int
    why_never: Callable[[int], str | None]

    def build(
        self,
        prompt: Prompt,
        config: GenerationConfig | None,
        tokenizer: Any,
        options: dict[str, Any],
        step: Callable[[], bool],
    ) -> list[Request]:
        """The requests for one prompt, whose waiters call `step`. Raises `ValueError` for what cannot be done."""
        if isinstance(prompt, Mapping) and "input_ids" in prompt:
            rows = unpadded(prompt)
            if len(rows) != 1:
                raise ValueError(f"a prompt is one row of token ids, and here are {len(rows)}: use generate.")
            prompt = rows[0]
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError("a prompt is a text: give its token ids, or a tokenizer.")
            try:
                prompt = tokenizer(prompt)["input_ids"]
            except Exception as error:
                raise ValueError(f"the tokenizer failed on the prompt: {error!r}") from error
        ids = self._ids(prompt)
        chosen = Options.of(len(ids), self.model.generation_config, config, **options)
        if chosen.stop_strings and tokenizer is None:
            raise ValueError("stop_strings are texts: give a tokenizer.")
        # An id that the model does not have, such as -1, is the usual way to say that nothing ends it.
        within = frozenset(one for one in chosen.stop_token_ids if 0 <= one < self.model.config.vocab_size)
        chosen = replace(chosen, stop_token_ids=within)
        wanted = len(ids) + chosen.max_new_tokens
        # The last token of a prompt that is only scored is not computed.
        if wanted - (not chosen.max_new_tokens) > self.max_tokens:
            raise TooLongError(
                f"{len(ids)} tokens of the prompt and max_new_tokens={chosen.max_new_tokens} are more than the "
                f"{self.max_tokens} that the model (max_position_embeddings) or the batcher (max_length) allows. "
                "Shorten one of them."
            )
        if reason := self.why_never(wanted):
            raise TooLongError(reason)
        decode = None
        if chosen.stop_strings:
            decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        requests = [Request(ids, chosen, n, step, decode) for n in range(chosen.num_return_sequences)]
        for request in requests:
            request.completions = tuple(requests)
        return requests

    def _ids(self, prompt: Any) -> list[int]:
        if hasattr(prompt, "tolist"):  # a tensor, or an array
            prompt = prompt.tolist()
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes) or not all(map(is_id, prompt)):
            text = repr(prompt)
            raise ValueError(f"a prompt is a list of token ids, not {text if len(text) < 60 else text[:56] + ' ...'}.")
        if not prompt:
            raise ValueError("the prompt is empty: give one token at least, such as the model's bos_token_id.")
        vocab_size = self.model.config.vocab_size
        if wrong := [one for one in prompt if not 0 <= one < vocab_size]:
            raise ValueError(f"the prompt holds the id {wrong[0]}, and the model has 0 to {vocab_size - 1}.")
        return list(map(int, prompt))

"""What the user gives, checked: prompts as token ids, and requests whose demands can be met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from transformers import GenerationConfig

from .options import Options
from .request import Request

Prompt = str | Sequence[int] | torch.Tensor


@dataclass(frozen=True)
class Limits:
    """What this model and these pages can do.

    Attributes:
        vocabulary: how many token ids there are.
        most_tokens: of a prompt and its completion.
        why_never: the reason why so many tokens never fit into the pages, or None.
        of_model: what the model says of how it generates.
    """

    vocabulary: int
    most_tokens: int
    why_never: Callable[[int], str | None]
    of_model: GenerationConfig

    def requests(
        self,
        prompt: Prompt,
        config: GenerationConfig | None,
        tokenizer: Any,
        options: dict[str, Any],
        step: Callable[[], bool],
    ) -> list[Request]:
        """The requests for one prompt. Raises `ValueError` for what cannot be done."""
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError("a prompt is a text: give its token ids, or a tokenizer.")
            try:
                prompt = tokenizer(prompt)["input_ids"]
            except Exception as error:
                raise ValueError(f"the tokenizer failed on the prompt: {error!r}") from error
        ids = self._ids(prompt)
        chosen = Options.of(len(ids), self.of_model, config, **options)
        if chosen.stop_strings and tokenizer is None:
            raise ValueError("stop_strings are texts: give a tokenizer.")
        # An id that the model does not have, such as -1, is the usual way to say that nothing ends it.
        within = frozenset(one for one in chosen.stop_token_ids if 0 <= one < self.vocabulary)
        chosen = replace(chosen, stop_token_ids=within)
        wanted = len(ids) + chosen.max_new_tokens
        if wanted > self.most_tokens:
            raise ValueError(
                f"{len(ids)} tokens of the prompt and max_new_tokens={chosen.max_new_tokens} are more than the "
                f"{self.most_tokens} that the model allows (max_position_embeddings). Shorten one of them."
            )
        if reason := self.why_never(wanted):
            raise ValueError(reason)
        requests = [Request(ids, chosen, n, step) for n in range(chosen.num_return_sequences)]
        for request in requests:
            request.completions = tuple(requests)
        return requests

    def _ids(self, prompt: Any) -> list[int]:
        if hasattr(prompt, "tolist"):  # a tensor, or an array
            prompt = prompt.tolist()
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes) or not all(map(_is_id, prompt)):
            raise ValueError(f"a prompt is a list of token ids, not {_short(prompt)}.")
        if not prompt:
            raise ValueError("the prompt is empty: give one token at least, such as the model's bos_token_id.")
        if wrong := [one for one in prompt if not 0 <= one < self.vocabulary]:
            raise ValueError(f"the prompt holds the id {wrong[0]}, and the model has 0 to {self.vocabulary - 1}.")
        return list(map(int, prompt))


def _is_id(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]} ..."

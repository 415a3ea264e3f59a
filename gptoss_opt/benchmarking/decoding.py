"""Greedy decoding of random prompts, and when each token of it is there."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor


class Clock(list[float]):
    """A streamer for `generate` that notes when the prompt is there, and when each token.

    Example:
        >>> clock = Clock()
        >>> tokens = greedy(model, random_prompt(model, 4), 3, streamer=clock)
        >>> len(clock), clock == sorted(clock)
        (4, True)
    """

    def put(self, tokens: Tensor) -> None:
        """Note the time."""
        self.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing after the last token."""


def random_prompt(model: Any, length: int) -> Tensor:
    """Random token ids `[1, length]`, the same for every model of that vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, length), generator=generator).to(model.device)


def greedy(model: Any, prompt: Tensor, new_tokens: int, **options: Any) -> Any:
    """What `generate` returns after exactly so many greedy tokens; the prompt `[B, T]` is not padded by default."""
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, **options}
    return model.generate(prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **options)

"""`Contender`: a model in a process of its own, and what is measured of it there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..verification import Verification, verify
from .decoding import Clock, greedy, random_prompt
from .peak import PeakMemory

COMPARED = 16
"""The logits after so many last tokens of a prompt are compared."""
VERIFIED = 24
"""How long the row is that goes through every part beside plain computations: those are slow."""


class Loaded(NamedTuple):
    """What a model took to load, in seconds, and in bytes at the peak until it had decoded once; None if not known."""

    seconds: float
    peak_bytes: int | None


class Turn(NamedTuple):
    """Seconds from a prompt to its first new token, and seconds of each token after that."""

    prompt: float
    token: float


@dataclass
class Contender:
    """A model that is loaded when it begins, and then takes its turns.

    Attributes:
        load: gives the model.
        device: "cpu" or "cuda".
        prompt: the tokens of the prompt.
        new_tokens: those that are decoded after the first new one.

    Example:
        >>> contender = Contender(lambda: model, "cpu", prompt=8, new_tokens=2)
        >>> contender.begin().seconds < 60, contender.turn().token > 0, contender.verification().right
        (True, True, True)
    """

    load: Callable[[], Any]
    device: str
    prompt: int
    new_tokens: int

    def __call__(self, question: Callable[[Contender], Any]) -> Any:
        """What a method of this class gives: how a process is asked."""
        return question(self)

    def begin(self) -> Loaded:
        """Load the model, and take a first turn, which does not count."""
        device = torch.empty(0, device=self.device).device  # CUDA starts before the clock does
        memory = PeakMemory(device)
        memory.reset()
        start = time.perf_counter()
        self.model = self.load()
        seconds = time.perf_counter() - start
        self.turn()
        return Loaded(seconds, memory.peak())

    def verification(self) -> Verification:
        """Every part of the model beside plain computations of its weights."""
        return verify(self.model, tokens=random_prompt(self.model, VERIFIED))

    @torch.no_grad()
    def logits(self, shift: int = 0) -> Tensor:
        """The last logits `[N, vocabulary]`, in float32, of the prompt that is timed, or of one with other tokens.

        Args:
            shift: what is added to each token: 0 leaves the prompt as it is timed.
        """
        prompt = (random_prompt(self.model, self.prompt) + shift) % self.model.config.vocab_size
        found: Tensor = self.model(prompt, logits_to_keep=min(COMPARED, self.prompt)).logits
        return found[0].float().cpu()

    def turn(self) -> Turn:
        """Decode greedily after the prompt."""
        clock = Clock()
        greedy(self.model, random_prompt(self.model, self.prompt), 1 + self.new_tokens, streamer=clock)
        begin, first, *_, last = clock  # the prompt itself is put first
        return Turn(first - begin, (last - first) / self.new_tokens)

"""What a model is to do: a task, and how many tokens of how many sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Task = Literal["generate", "serve", "lora", "full"]
Objective = Literal["fit", "latency", "throughput"]
MAX_BATCH_TOKENS = 2048
"""How many tokens a step of `ContinuousBatcher` computes, if nothing else is asked for."""

MOST = 1_000_000_000
"""Tokens and sequences."""


@dataclass(frozen=True)
class Workload:
    """A task and its sizes.

    Attributes:
        task: "generate", "serve" (continuous batching), "lora" or "full" (finetuning).
        context: tokens of a sequence: prompt and what is generated, or a row of training.
        batch: sequences at once.
        checkpointing: whether layers are computed again in the backward pass.
        optimizer: by its name in `OPTIMIZERS`.
    """

    task: Task = "generate"
    context: int = 4096
    batch: int = 1
    checkpointing: bool = False
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise ValueError(f"task is {self.task!r}. Use one of {', '.join(map(repr, get_args(Task)))}.")
        for name in ("context", "batch"):
            number = getattr(self, name)
            if type(number) is not int or not 1 <= number <= MOST:
                said = repr(number) if not isinstance(number, int) or number < MOST else "too large"
                raise ValueError(f"{name} is {said}. Give a whole number from 1 up, to {MOST:,}.")

    @property
    def trains(self) -> bool:
        """Whether it is a finetuning."""
        return self.task in ("lora", "full")

    @property
    def tokens(self) -> int:
        """How many tokens a forward computes at most: all prompts at once, or a step of the batcher."""
        tokens = self.context * self.batch
        return min(tokens, MAX_BATCH_TOKENS) if self.task == "serve" else tokens

"""How many Python frames of the package are entered by a forward, a training step and a step of serving.

The model is tiny and has one layer, so that a count is what one layer takes beside its kernels, and a whole call once.
Comprehensions and every value of a generator are frames too, by the version of Python.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

import gptoss_opt
from benchmarks.case import Case, Point, Settings
from gptoss_opt import ContinuousBatcher, load, undo, with_flash_attention, with_mxfp4_experts
from gptoss_opt.testing import random_checkpoint

PACKAGE = str(Path(gptoss_opt.__file__).parent)
NUM_TOKENS, NUM_SEQUENCES = 16, 4
TOLERANCE = 1e-4


def count_frames(step: Callable[[], object]) -> int:
    """How many frames of the package a step enters, in this thread."""
    count = 0

    def see(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        step()
    finally:
        sys.setprofile(before)
    return count


def fewest_frames(step: Callable[[], object]) -> int:
    """The count of the cheapest of three steps: now and then a sequence needs a new page."""
    return min(count_frames(step) for _ in range(3))


def tokens(num_sequences: int = 1) -> Tensor:
    """Random tokens."""
    return torch.randint(2, 250, (num_sequences, NUM_TOKENS), generator=torch.Generator().manual_seed(0))


def forward(model: Any) -> tuple[Callable[[], object], Callable[[Any], float]]:
    """A forward without gradients, and how far its logits are from those of another model."""

    def step(model: Any = model) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(tokens()).logits
        return logits

    return step, relative_to(step)


def training(model: Any) -> tuple[Callable[[], object], Callable[[Any], float]]:
    """A forward and backward, and how far the embedding's gradient is from that of another model."""

    def step(model: Any = model) -> Tensor:
        model.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        gradient: Tensor = model.get_input_embeddings().weight.grad
        return gradient

    return step, relative_to(step)


def relative_to(step: Callable[..., Tensor]) -> Callable[[Any], float]:
    """How far a result of the step is from what it gives on another model."""
    found = step()
    return lambda plain: float((found - step(plain)).norm() / step(plain).norm())


def serving(model: Any) -> tuple[Callable[[], object], Callable[[Any], float]]:
    """A step in which some sequences decode, and the share of their tokens that another model would not choose."""
    batcher = ContinuousBatcher(model, kv_memory=1 << 20)
    prompts = tokens(NUM_SEQUENCES).tolist()
    requests = [batcher.submit(prompt, max_new_tokens=64, eos_token_id=[]) for prompt in prompts]
    while not all(request.tokens for request in requests):
        batcher.step()

    def wrong(plain: Any) -> float:
        rows = torch.tensor([prompt + request.tokens for prompt, request in zip(prompts, requests, strict=True)])
        chosen = plain(rows).logits[:, NUM_TOKENS - 1 : -1].argmax(-1)
        return float((chosen != rows[:, NUM_TOKENS:]).float().mean())

    return batcher.step, wrong


@dataclass(frozen=True)
class Frames(Case):
    """The frames that a step enters when it is repeated.

    Attributes:
        make: makes the step on a model, and what says how wrong its results are by the same model without wrappers.
        wrappers: what the model is wrapped in.
        asked: fewer frames than this; it is what the first version of this benchmark counted.
    """

    folder: Path
    make: Callable[[Any], tuple[Callable[[], object], Callable[[Any], float]]]
    wrappers: tuple[Any, ...]
    asked: int
    columns = """
        case   | frames entered | asked
        {case} | {frames}       | < {asked}
    """

    def setup(self) -> Any:
        folder = self.folder / self.make.__name__
        model = load(random_checkpoint(folder, "tiny", layers=1), *self.wrappers, dtype=torch.float32)
        return model, *self.make(model)

    def run(self, made: Any, repeats: int) -> list[Point]:
        step = made[1]
        step()
        return [{"frames": fewest_frames(step), "asked": self.asked}]

    def verify(self, made: Any, points: list[Point]) -> None:
        """A step enters as many frames when it is counted again, and computes what the plain model does."""
        model, step, error = made
        again = fewest_frames(step)
        assert again == points[0]["frames"], (points, again)
        wrong = error(undo(model))
        assert wrong <= TOLERANCE, f"{self.name}: the result is off by {wrong:.2g}"

    def missed(self, points: list[Point]) -> list[str]:
        found = points[0]["frames"]
        return [f"{self.name} enters {found} frames, not fewer than {self.asked}"] * (found >= self.asked)


def cases(settings: Settings, folder: Path) -> list[Case]:
    """A forward, a training step and a step of serving."""
    flash, packed = with_flash_attention(), with_mxfp4_experts()
    return [
        Frames("forward, flash attention", folder, forward, (flash,), asked=62),
        Frames("training step, packed experts", folder, training, (packed,), asked=148),
        Frames("serving step, 4 sequences, both", folder, serving, (flash, packed), asked=272),
    ]


SETTINGS = Settings()

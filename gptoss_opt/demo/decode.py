"""How the demo measures the experts: what they take in memory, and how fast one token follows the other."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import load
from ..model.experts import expert_parameters
from .measure import Wrap, compare, load_eager
from .report import DecodeResult

PROMPT = 64
"""Tokens before those that are timed."""


class Decoder:
    """The model that a measuring process holds: as transformers loads it, or loaded with a wrapper."""

    def __init__(
        self,
        path: str,
        dtype: torch.dtype,
        label: str,
        wrap: Wrap | None,
        threads: int | None,
        device: torch.device | None = None,
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.label = label
        start = time.perf_counter()
        if wrap is None:
            self.model: Any = load_eager(path, dtype)
        else:
            default = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            self.model = load(path, wrap(None), device=device or default, dtype=dtype)
        self.load_seconds = time.perf_counter() - start

    @property
    def expert_bytes(self) -> int:
        """What the expert weights take, as they are stored."""
        names = tuple(expert_parameters(self.model))
        packed = tuple(f"{name}_{part}" for name in names for part in ("blocks", "scales"))
        weights = (p for name, p in self.model.named_parameters() if name in {*names, *packed})
        return sum(weight.numel() * weight.element_size() for weight in weights)

    def measure(self, new_tokens: int, file: Path) -> DecodeResult:
        """Generate, and compare tokens and logits with `file`, which the first row writes."""
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(self.model.config.vocab_size, (1, PROMPT), generator=generator).to(self.model.device)
        options: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
        clock = Clock()
        for count, streamer in ((2, None), (new_tokens + 1, clock)):
            tokens = self.model.generate(
                prompt, max_new_tokens=count, min_new_tokens=count, streamer=streamer, **options
            )
        with torch.no_grad():
            logits = self.model(prompt).logits[0].cpu()
        outputs = (tokens[0, PROMPT:].cpu(), logits, torch.empty(0))
        if not file.exists():
            torch.save(outputs, file)
        same, difference, _, problems = compare(torch.load(file), outputs)
        return DecodeResult(
            self.label,
            new_tokens + 1,
            same,
            difference,
            tuple(f"{self.label}: {problem}" for problem in problems),
            self.load_seconds,
            self.expert_bytes / 2**20,
            1 / clock.median_step(),
        )


class Clock:
    """A streamer for `generate` that notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        """Called with the prompt, then with every token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last."""

    def median_step(self) -> float:
        """Seconds from one token to the next."""
        # The first interval is the prompt's.
        steps = torch.tensor(self.times[1:], dtype=torch.float64).diff()
        return float(steps.median())

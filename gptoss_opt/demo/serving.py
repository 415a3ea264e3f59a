"""How the demo measures several prompts at once: by transformers' `generate`, and served by a `ContinuousBatcher`."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..serve import ContinuousBatcher, Request
from .decode import Decoder
from .measure import Wrap, compare
from .report import ServedResult

NUM_PROMPTS = 8
LENGTHS = (8, 120)
"""Of the prompts, in tokens: the shortest and the longest there may be."""

INTERVAL = 0.25
"""Seconds after which a batcher tells again how fast it is."""


class Served(NamedTuple):
    """What came of all prompts.

    Attributes:
        tokens: the new ones of each prompt.
        logits: after each prompt, up to a constant: [P, V].
        seconds: until all were there.
        first_seconds: until a prompt had its first, by the median; None if all come at the end.
        kv_bytes: of keys and values, the most that was held.
    """

    tokens: list[list[int]]
    logits: Tensor
    seconds: float
    first_seconds: float | None
    kv_bytes: float


class Server:
    """The model that a measuring process holds, and how it completes prompts of different lengths."""

    def __init__(self, path: str, dtype: torch.dtype, wrap: Wrap | None, threads: int | None) -> None:
        self.model: Any = Decoder(path, dtype, "", wrap, threads).model

    def measure(self, label: str, batcher: bool, new_tokens: int, file: Path) -> Iterator[float | ServedResult]:
        """Complete all prompts, and compare with `file`, which the first row writes.

        Yields:
            Now and then the tokens/s so far, and at last the result.
        """
        limits = most_tokens(new_tokens)
        served = (yield from self._by_batcher(limits)) if batcher else self._by_generate(limits)
        flat = torch.tensor([token for tokens in served.tokens for token in tokens])
        # Log-probabilities are logits up to a constant, which goes.
        logits = (served.logits - served.logits.mean(-1, keepdim=True)).to(self.model.dtype)
        outputs = (flat, logits, torch.empty(0))
        if not file.exists():
            torch.save(outputs, file)
        expected = torch.load(file)
        _, difference, _, problems = compare(expected, outputs)
        # A prompt whose tokens differ says nothing of the next.
        equal = (expected[0] == flat).split(limits)
        yield ServedResult(
            label,
            len(flat),
            sum(int(one.cumprod(0).sum()) for one in equal),
            difference,
            tuple(f"{label}: {problem}" for problem in problems),
            len(flat) / served.seconds,
            None if served.first_seconds is None else served.first_seconds * 1e3,
            served.kv_bytes / 2**10,
        )

    def _by_generate(self, limits: list[int]) -> Served:
        """In one padded batch, until the longest is done."""
        prompts = random_prompts(self.model.config.vocab_size, seed=0)
        width = max(map(len, prompts))
        padding = [width - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)])
        mask = torch.arange(width) >= torch.tensor(padding)[:, None]
        options: dict[str, Any] = {"attention_mask": mask.long().to(self.model.device), "do_sample": False}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        ids, seconds = ids.to(self.model.device), 0.0
        for count in (2, max(limits)):
            start = time.perf_counter()
            out = self.model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
            rows = out.sequences[:, width:].tolist()
            seconds = time.perf_counter() - start
        tokens = [row[:limit] for row, limit in zip(rows, limits, strict=True)]
        kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
        return Served(tokens, out.logits[0].float().cpu(), seconds, None, kv_bytes)

    def _by_batcher(self, limits: list[int]) -> Generator[float, None, Served]:
        """Beside each other, each until it is done."""
        vocabulary = self.model.config.vocab_size
        batcher = ContinuousBatcher(self.model, max_num_sequences=NUM_PROMPTS)

        def submit(seed: int, limits: list[int], **options: Any) -> list[Request]:
            pairs = zip(random_prompts(vocabulary, seed), limits, strict=True)
            options["do_sample"] = False
            return [batcher.submit(ids, max_new_tokens=n, min_new_tokens=n, **options) for ids, n in pairs]

        try:
            # To warm up, as many other tokens: of the same ones, pages would be shared.
            for request in submit(1, limits):
                request.result()
            start = told = time.perf_counter()
            requests = submit(0, limits)
            seconds, most_used = 0.0, 0
            while batcher.step():
                seconds = time.perf_counter() - start
                # Within a step, sliding layers have the whole chunks of prompts for a moment.
                most_used = max(most_used, batcher.stats().pages_used)
                if start + seconds - told > INTERVAL:
                    told = start + seconds
                    yield sum(len(request.tokens) for request in requests) / seconds
            tokens = [request.result() for request in requests]
            firsts = [request.times[0] - start for request in requests]
            stats = batcher.stats()
            logits = torch.empty(NUM_PROMPTS, vocabulary)
            for row, request in zip(logits, submit(0, [1] * NUM_PROMPTS, logprobs=vocabulary), strict=True):
                request.result()
                likeliest, logprobs = zip(*request.logprobs[0].likeliest, strict=True)
                row[list(likeliest)] = torch.tensor(logprobs)
        finally:
            batcher.close()
        kv_bytes = stats.kv_bytes / stats.num_pages * most_used
        return Served(tokens, logits, seconds, float(torch.tensor(firsts).median()), kv_bytes)


def random_prompts(vocabulary: int, seed: int) -> list[list[int]]:
    """`NUM_PROMPTS` lists of token ids; their lengths are the same with every seed."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(LENGTHS[0], LENGTHS[1] + 1, (NUM_PROMPTS,), generator=generator).tolist()
    generator.manual_seed(seed)
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]


def most_tokens(new_tokens: int) -> list[int]:
    """How many tokens each prompt gets: from half to all of `new_tokens` + 1, at least 2, and the first gets all."""
    # With 2 it is still there after the step that computes its prompt, and its pages are seen.
    least = max((new_tokens + 1) // 2, 2)
    generator = torch.Generator().manual_seed(0)
    found: list[int] = torch.randint(least, new_tokens + 2, (NUM_PROMPTS - 1,), generator=generator).tolist()
    return [new_tokens + 1, *found]

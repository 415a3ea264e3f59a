"""How the demo measures several prompts at once: by transformers' `generate`, and served by a `ContinuousBatcher`."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from statistics import median_low
from typing import Any

import torch
from torch import Tensor

from ..benchmarking.decoding import greedy
from ..serve import ContinuousBatcher, Request
from .comparison import Case, Settings, Step
from .measure import load_model, verify

NUM_PROMPTS = 8
MIN_PROMPT, MAX_PROMPT = 8, 120
"""The bounds of the prompts' lengths, in tokens."""

INTERVAL = 0.25
"""Seconds after which a batcher tells again how fast it is."""

Served = tuple[list[list[int]], Tensor, dict[str, Any]]
"""The new tokens of each prompt, the logits after each prompt up to a constant [P, V], and figures."""


def measure_serving(cases: Sequence[Case], settings: Settings) -> Iterator[Step]:
    """Complete all prompts in the way of each case, telling now and then how many tokens/s there are so far."""
    yield "serve: load"
    model = load_model(settings, cases[0].wrap)
    limits = token_limits(settings.new_tokens)
    for case in cases:
        yield f"{case.label}: start"
        served = (yield from _by_batcher(model, limits, case.label)) if case.batcher else _by_generate(model, limits)
        tokens, logits, figures = served
        # Log-probabilities are logits up to a constant, which goes.
        logits = (logits - logits.mean(-1, keepdim=True)).to(model.dtype)
        outputs = (torch.tensor([token for row in tokens for token in row]), logits, torch.empty(0))
        yield verify(case.label, outputs, settings.folder / "first.pt", {"served by": case.label, **figures}, limits)


def _by_generate(model: Any, limits: list[int]) -> Served:
    prompts = random_prompts(model.config.vocab_size, seed=0)
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]).to(model.device)
    mask = (torch.arange(width) >= torch.tensor(padding)[:, None]).long().to(model.device)
    options = {"attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    greedy(model, ids, 2, **options)
    start = time.perf_counter()
    out = greedy(model, ids, max(limits), **options)
    rows = out.sequences[:, width:].tolist()
    seconds = time.perf_counter() - start
    tokens = [row[:limit] for row, limit in zip(rows, limits, strict=True)]
    kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    figures = {"speed": sum(limits) / seconds, "first token": None, "keys and values": kv_bytes / 2**10}
    return tokens, out.logits[0].float().cpu(), figures


def _by_batcher(model: Any, limits: list[int], label: str) -> Generator[str, None, Served]:
    vocabulary = model.config.vocab_size
    batcher = ContinuousBatcher(model, max_num_sequences=NUM_PROMPTS)

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
        seconds, max_pages = 0.0, 0
        while batcher.step():
            seconds = time.perf_counter() - start
            # Within a step, sliding layers have the whole chunks of prompts for a moment.
            max_pages = max(max_pages, batcher.stats().pages_used)
            if start + seconds - told > INTERVAL:
                told = start + seconds
                yield f"{label}: {sum(len(request.tokens) for request in requests) / seconds:.0f} tokens/s"
        tokens = [request.result() for request in requests]
        first_seconds = median_low(request.times[0] - start for request in requests)
        stats = batcher.stats()
        logits = torch.empty(NUM_PROMPTS, vocabulary)
        for row, request in zip(logits, submit(0, [1] * NUM_PROMPTS, logprobs=vocabulary), strict=True):
            request.result()
            likeliest, logprobs = zip(*request.logprobs[0].likeliest, strict=True)
            row[list(likeliest)] = torch.tensor(logprobs)
    finally:
        batcher.close()
    figures = {
        "speed": sum(limits) / seconds,
        "first token": first_seconds * 1e3,
        "keys and values": stats.kv_bytes / stats.num_pages * max_pages / 2**10,
    }
    return tokens, logits, figures


def random_prompts(vocabulary: int, seed: int) -> list[list[int]]:
    """`NUM_PROMPTS` lists of token ids; their lengths are the same with every seed."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(MIN_PROMPT, MAX_PROMPT + 1, (NUM_PROMPTS,), generator=generator).tolist()
    generator.manual_seed(seed)
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]


def token_limits(new_tokens: int) -> list[int]:
    """How many tokens each prompt gets: from half to all of `new_tokens` + 1, at least 2, and the first gets all."""
    # With 2 it is still there after the step that computes its prompt, and its pages are seen.
    min_tokens = max((new_tokens + 1) // 2, 2)
    generator = torch.Generator().manual_seed(0)
    found: list[int] = torch.randint(min_tokens, new_tokens + 2, (NUM_PROMPTS - 1,), generator=generator).tolist()
    return [new_tokens + 1, *found]

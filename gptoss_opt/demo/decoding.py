"""How the demo measures decoding: how fast one token follows the other, with weights held in each way."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median_low
from typing import Any

import torch
from torch import distributed, multiprocessing

from .. import explain, load
from ..benchmarking.decoding import Clock, greedy, random_prompt
from ..model.experts import expert_parameters
from .comparison import Case, Outcome, Settings, Step
from .measure import load_model, verify

PROMPT_LENGTH = 64
"""How many tokens come before those that are timed."""


def decode(model: Any, label: str, settings: Settings, figures: dict[str, Any]) -> Outcome:
    """Generate greedily, and add to the figures how fast one token follows the other."""
    prompt = random_prompt(model, PROMPT_LENGTH)
    greedy(model, prompt, 2)
    clock = Clock()
    tokens = greedy(model, prompt, settings.new_tokens + 1, streamer=clock)
    with torch.no_grad():
        logits = model(prompt).logits[0].cpu()
    # The time up to the first token is the prompt's.
    speed = 1 / median_low(then - now for now, then in pairwise(clock[1:]))
    outputs = (tokens[0, PROMPT_LENGTH:].cpu(), logits, torch.empty(0))
    return verify(label, outputs, settings.folder / "first.pt", {**figures, "decode": speed})


def measure_experts(cases: Sequence[Case], settings: Settings) -> Iterator[Step]:
    """Decode in this process, after the experts were loaded as the wrapper of these cases holds them."""
    yield f"{cases[0].label}: decode"
    start = time.perf_counter()
    model = load_model(settings, cases[0].wrap)
    seconds = time.perf_counter() - start
    names = tuple(expert_parameters(model))
    names += tuple(f"{name}_{part}" for name in names for part in ("blocks", "scales"))
    held = sum(weight.nbytes for name, weight in model.named_parameters() if name in names)
    for case in cases:
        figures = {"experts": case.label, "load": seconds, "expert weights": held / 2**20}
        yield replace(decode(model, case.label, settings, figures), explanation=str(explain(model)))


def measure_sharded(cases: Sequence[Case], settings: Settings) -> Iterator[Step]:
    """Decode in `settings.ranks` processes that hold the model together, or in one if there is no wrapper."""
    for case in cases:
        yield f"{case.label}: decode"
        store = distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        ranks = 1 if case.wrap is None else settings.ranks
        multiprocessing.spawn(_on_rank, (store.port, ranks, case, settings), nprocs=ranks)
        yield torch.load(settings.folder / "outcome.pt", weights_only=False)


def _on_rank(rank: int, port: int, ranks: int, case: Case, settings: Settings) -> None:
    # Several ranks share the cores.
    torch.set_num_threads(settings.threads or max(torch.get_num_threads() // ranks, 1))
    gpus = torch.cuda.device_count() >= ranks
    if gpus:
        torch.cuda.set_device(rank)
    store = distributed.TCPStore("127.0.0.1", port, None, False)
    distributed.init_process_group("nccl" if gpus else "gloo", store=store, rank=rank, world_size=ranks)
    wrappers: list[Any] = [] if case.wrap is None else [case.wrap]
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    model = load(settings.path, *wrappers, device=device, dtype=getattr(torch, settings.dtype))
    label = f"{case.label}, {ranks} ranks" if wrappers else case.label
    held = sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in model.parameters())
    outcome = decode(model, case.label, settings, {"held by": label, "parameters of a rank": held / 2**20})
    if rank == 0:
        torch.save(outcome, settings.folder / "outcome.pt")
    distributed.barrier()
    distributed.destroy_process_group()

"""How the demo measures wrappers on a loaded model: generation and a training step, their time and memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import explain
from ..benchmarking.decoding import greedy, random_prompt
from ..benchmarking.peak import PeakMemory
from .comparison import Case, Outcome, Settings, Step
from .measure import load_model, verify


def measure_stacks(cases: Sequence[Case], settings: Settings) -> Iterator[Step]:
    """Generate and take one training step at each length, with the wrapper of these cases."""
    yield f"{cases[0].label}: load"
    model = load_model(settings)
    if cases[0].wrap is not None:
        model = cases[0].wrap(model)
    memory = PeakMemory(model.device)
    _generate(model, random_prompt(model, 16), 2)
    _train_step(model, random_prompt(model, 16))
    for case in cases:
        yield None
        for length in settings.lengths:
            yield f"{case.label}: length {length}"
            yield replace(_at_length(length, model, memory, case.label, settings), explanation=str(explain(model)))


# A function of its own, so that no tensor of one length is left while the next one is measured.
def _at_length(length: int, model: Any, memory: PeakMemory, label: str, settings: Settings) -> Outcome:
    prompt = random_prompt(model, length)
    memory.reset()
    tokens, generate_seconds = _generate(model, prompt, settings.new_tokens)
    logits, sinks, train_seconds = _train_step(model, prompt)
    figures = {"length": length, "stack": label, "generate": generate_seconds, "train step": train_seconds}
    figures["peak memory"] = memory.peak()
    outputs = (tokens, logits.cpu(), sinks)
    return verify(f"{label} at length {length}", outputs, settings.folder / f"{length}.pt", figures)


def _generate(model: Any, prompt: Tensor, new_tokens: int) -> tuple[Tensor, float]:
    start = _now(model)
    tokens = greedy(model, prompt, new_tokens)
    return tokens[0, prompt.shape[1] :].cpu(), _now(model) - start


def _train_step(model: Any, prompt: Tensor) -> tuple[Tensor, Tensor, float]:
    """Forward with labels, and backward: logits [T, V], gradients of all sinks, and the seconds they took."""
    model.train()
    start = _now(model)
    out = model(input_ids=prompt, labels=prompt, use_cache=False)
    out.loss.backward()
    seconds = _now(model) - start
    sinks = [param for name, param in model.named_parameters() if name.endswith(".sinks") and param.requires_grad]
    # A sink that no gradient reached counts as zero, which is far from the right one.
    gradients = [(torch.zeros_like(sink) if sink.grad is None else sink.grad).float().cpu() for sink in sinks]
    model.zero_grad(set_to_none=True)
    model.eval()
    return out.logits[0].detach(), torch.cat(gradients or [torch.empty(0)]), seconds


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()

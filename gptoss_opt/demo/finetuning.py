"""How the demo measures fine-tuning: steps of AdamW on a row of random tokens, of all parameters or adapters."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import pairwise
from statistics import median_low
from typing import Any

import psutil
import torch
from torch import Tensor

from .. import explain
from ..benchmarking.decoding import random_prompt
from ..benchmarking.peak import PeakMemory
from .comparison import Case, Outcome, Settings, Step
from .measure import load_model

NUM_TOKENS = 768
STEPS = 3
RATE = 2e-4
"""The learning rate."""

# How far the loss of the first step may be from that of the first case, and where both train the same parameters, the
# loss of any step; relative. AdamW moves each parameter as far, however small its gradient, so rounding errors grow.
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-3, 2e-2)}

SHARE_OF_MEMORY = 0.75
"""How much of the free memory a case may ask for beforehand; activations take of the rest."""

Curve = tuple[Tensor, int, bool]
"""The losses of all steps [STEPS], the number of trained parameters, and whether they are those of adapters."""


def in_peft(model: Any) -> Any:
    """The model with adapters of peft, of the rank and on the weights that `with_lora` takes by default."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    attention, experts = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_up_proj", "down_proj"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=attention, target_parameters=experts)
    with warnings.catch_warnings():
        # What peft calls that newer versions of transformers call otherwise says nothing about the model.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config)


def measure_finetuning(cases: Sequence[Case], settings: Settings) -> Iterator[Step]:
    """Load the model as the wrapper of these cases has it, and train it on one row."""
    for case in cases:
        yield f"{case.label}: {STEPS} steps"
        yield _finetuned(case, settings)


def _finetuned(case: Case, settings: Settings) -> Outcome:
    if case.wrap is in_peft and not find_spec("peft"):
        return left_out(case.label, "peft is not installed")
    model: Any = in_peft(load_model(settings)) if case.wrap is in_peft else load_model(settings, case.wrap)
    explanation = str(explain(model))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Gradients, and two values of AdamW for each parameter; peft makes W + BA, which is as large as W.
    needed = 3 * _num_bytes(trained) + (_num_bytes(model.parameters()) if case.wrap is in_peft else 0)
    if needed > SHARE_OF_MEMORY * _free_memory(model.device):
        return left_out(case.label, f"needs {needed / 2**30:.1f} GiB beside the model")
    memory = PeakMemory(model.device)
    memory.reset()
    losses, speed = train(model, trained, random_prompt(model, NUM_TOKENS))
    count = sum(parameter.numel() for parameter in trained)
    figures: dict[str, Any] = {"fine-tuning": case.label, "peak memory": memory.peak(), "trained parameters": count}
    figures |= {"first loss": losses[0].item(), "last loss": losses[-1].item(), "speed": speed}
    curve = losses, count, any("lora_" in name for name, _ in model.named_parameters())
    file = settings.folder / "first.pt"
    if not file.exists():
        torch.save(curve, file)
    problems = judge(torch.load(file), curve, getattr(torch, settings.dtype))
    return Outcome(figures, tuple(f"{case.label}: {problem}" for problem in problems), explanation)


def left_out(label: str, reason: str) -> Outcome:
    """The row of a case that cannot be measured here, with the reason."""
    names = ("first loss", "last loss", "speed", "peak memory", "trained parameters")
    return Outcome({"fine-tuning": f"{label}: {reason}", **dict.fromkeys(names)})


def train(model: Any, trained: Iterable[Tensor], ids: Tensor) -> tuple[Tensor, float]:
    """Train on token ids [1, T]: the losses of all steps [STEPS], and tokens/s by the median step after the first."""
    model.train()
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    losses, times = torch.empty(STEPS), []
    for step in range(STEPS):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[step] = loss.detach()
        if ids.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter())
    return losses, ids.numel() / median_low(then - now for now, then in pairwise(times))


def judge(first: Curve, curve: Curve, dtype: torch.dtype) -> list[str]:
    """What is wrong with how a case trains, beside the first case; empty if nothing is."""
    (expected, count_in_first, adapters_in_first), (losses, count, adapters) = first, curve
    off = (losses - expected).abs() / expected
    bound, bound_of_all = TOLERANCES[dtype]
    problems = []
    # Written so that a NaN is a problem.
    if not off[0] <= bound:
        problems.append(f"the loss of the first step is off by {off[0]:.1e}, above {bound:.0e}.")
    if not losses[-1] < losses[0]:
        problems.append(f"the loss does not fall: {losses[0]:.4f} in the first step, {losses[-1]:.4f} in the last.")
    if adapters == adapters_in_first and count != count_in_first:
        problems.append(f"it trains {count:,} parameters, not {count_in_first:,}.")
    if not adapters and not adapters_in_first and not off.max() <= bound_of_all:
        problems.append(f"the loss of a later step is off by {off.max():.1e}, above {bound_of_all:.0e}.")
    return problems


def _num_bytes(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.nbytes for parameter in parameters)


def _free_memory(device: torch.device) -> int:
    free: int = psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    return free

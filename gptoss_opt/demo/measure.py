"""How the demo measures one stack: what it computes, how long that takes, and how much memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.quantization_config import Mxfp4Config

from .report import Result


@dataclass(frozen=True)
class Tolerance:
    """How far a stack may be from the first row. None and False: shown, but not judged.

    `largest`: max |difference| / max |logit|. `median`: over positions, of |difference| / |logits|.
    """

    largest: float | None
    median: float
    sinks: float | None
    tokens: bool


# In 16 bits, rounding sends a token with nearly equal router scores to another expert, in eager as well. Such a token
# has other logits, so neither the largest difference nor the greedy tokens can be held to a bound; the median can.
TOLERANCES = {
    torch.float32: Tolerance(1e-4, 1e-5, 1e-3, True),
    torch.bfloat16: Tolerance(None, 0.1, None, False),
    torch.float16: Tolerance(None, 0.02, None, False),
}

Wrap = Callable[[Any], Any]
Outputs = tuple[Tensor, Tensor, Tensor]
"""Greedy tokens [N], logits [T, V], gradients of the sinks [layers * heads], empty if they are frozen."""


class Agreement(NamedTuple):
    """How one stack's outputs agree with the first's; the attributes are those of `Result`."""

    same_tokens: int
    logit_difference: float
    sink_difference: float | None
    problems: tuple[str, ...]


class Subject:
    """The model that a measuring process holds, and what is done to it."""

    def __init__(self, path: str, dtype: torch.dtype | str, label: str, wrap: Wrap | None, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.label = label
        self.model: Any = load_eager(path, dtype)
        if wrap is not None:
            self.model = wrap(self.model)
        self.memory = PeakMemory(self.model.device)
        self.generate(self.prompt(16), 2)
        self.train_step(self.prompt(16))

    def prompt(self, length: int) -> Tensor:
        """Random token ids [1, length], the same for every stack."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.model.config.vocab_size, (1, length), generator=generator).to(self.model.device)

    def generate(self, prompt: Tensor, new_tokens: int) -> tuple[Tensor, float]:
        """The greedy tokens [new_tokens], and the seconds they took."""
        options: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        start = self._now()
        tokens = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        return tokens[0, prompt.shape[1] :].cpu(), self._now() - start

    def train_step(self, prompt: Tensor) -> tuple[Tensor, Tensor, float]:
        """Forward with labels, and backward: logits [T, V], gradients of all sinks, and the seconds they took."""
        self.model.train()
        start = self._now()
        out = self.model(input_ids=prompt, labels=prompt, use_cache=False)
        out.loss.backward()
        seconds = self._now() - start
        named = self.model.named_parameters()
        sinks = [param for name, param in named if name.endswith(".sinks") and param.requires_grad]
        # A sink that no gradient reached counts as zero, which is far from the right one.
        gradients = [(torch.zeros_like(sink) if sink.grad is None else sink.grad).float().cpu() for sink in sinks]
        self.model.zero_grad(set_to_none=True)
        self.model.eval()
        return out.logits[0].detach(), torch.cat(gradients or [torch.empty(0)]), seconds

    def measure(self, length: int, new_tokens: int, file: Path) -> Result:
        """Generate and take one training step, and compare with `file`, which the first row writes."""
        self.memory.reset()
        tokens, generate_seconds = self.generate(self.prompt(length), new_tokens)
        logits, sinks, train_seconds = self.train_step(self.prompt(length))
        peak = self.memory.peak()
        if not file.exists():
            torch.save((tokens, logits.cpu(), sinks), file)
        agreement = compare(torch.load(file), (tokens, logits.cpu(), sinks))
        where = f"{self.label} at length {length}: "
        agreement = agreement._replace(problems=tuple(where + problem for problem in agreement.problems))
        return Result(self.label, length, new_tokens, *agreement, generate_seconds, train_seconds, peak)

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def load_eager(path: str, dtype: torch.dtype | str) -> Any:
    """The model as transformers loads it, in eager attention and with weights that can be trained."""
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
    if getattr(AutoConfig.from_pretrained(path), "quantization_config", None):
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    if torch.cuda.is_available():
        options["device_map"] = "cuda"
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    for parameter in model.parameters():
        # Expert weights: older versions leave dequantised ones in bfloat16, whatever is asked for.
        if parameter.ndim == 3:
            parameter.data = parameter.data.to(model.dtype)
    return model


def compare(expected: Outputs, actual: Outputs) -> Agreement:
    """Hold the outputs of one stack to those of the first, with the tolerance of their dtype."""
    same = int((expected[0] == actual[0]).cumprod(0).sum())
    positions = []
    # In pieces, as float32 copies of all logits of a large model would fill the memory.
    for want, have in zip(torch.split(expected[1], 256), torch.split(actual[1], 256), strict=True):
        difference = have.float() - want.float()
        ratio = difference.norm(dim=-1) / want.float().norm(dim=-1)
        positions.append(torch.stack((difference.abs().amax(-1), want.float().abs().amax(-1), ratio)))
    largest, highest = torch.cat(positions, dim=1)[:2].amax(1).tolist()
    median = torch.cat(positions, dim=1)[2].median().item()
    sinks = ((actual[2] - expected[2]).norm() / expected[2].norm()).item() if actual[2].numel() else None

    tolerance, problems = TOLERANCES[actual[1].dtype], []
    # Written so that a NaN is a problem.
    if tolerance.tokens and same < len(actual[0]):
        problems.append("the greedy tokens differ.")
    if tolerance.largest is not None and not largest / highest <= tolerance.largest:
        problems.append(f"max logit difference / max logit is {largest / highest:.1e}, above {tolerance.largest:.0e}.")
    if not median <= tolerance.median:
        problems.append(f"the median relative logit difference is {median:.1e}, above {tolerance.median:.0e}.")
    if tolerance.sinks is not None and sinks is not None and not sinks <= tolerance.sinks:
        problems.append(f"the relative sink gradient difference is {sinks:.1e}, above {tolerance.sinks:.0e}.")
    return Agreement(same, largest, sinks, tuple(problems))


class PeakMemory:
    """Peak memory beyond what is held now: torch's own count on CUDA, resident memory of the process on Linux.

    The kernel keeps the peak of resident memory, so no short one is missed; writing 5 to clear_refs resets it.
    """

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self.cuda = device.type == "cuda"
        self.held = torch.cuda.memory_allocated() if self.cuda else _resident("VmRSS")

    def reset(self) -> None:
        """Forget earlier peaks."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.held = None

    def peak(self) -> float | None:
        """MiB at the peak since `reset`, less those held at first; None where the system does not tell."""
        highest = torch.cuda.max_memory_allocated() if self.cuda else _resident("VmHWM")
        return None if self.held is None or highest is None else max(highest - self.held, 0) / 2**20


def _resident(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)

"""Fine-tuning with LoRA on attention and experts, beside transformers and peft: tokens/s, memory, and length.

The model beside peft is that of `benchmarks.batching`, of 8 layers; each contender holds it in a process of its own,
and they take turns. A step is forward, backward and AdamW on one sequence.
"""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import case
from benchmarks.case import Case, Point
from benchmarks.harness import device, forget_peak, median_ratio, resident, seconds
from gptoss_opt import (
    load,
    load_adapter,
    save_adapter,
    with_chunked_loss,
    with_flash_attention,
    with_lora,
    with_mxfp4_experts,
)
from gptoss_opt.apart import Apart
from gptoss_opt.testing import random_checkpoint

RANK = 8
OURS, FROZEN = "ours, packed experts", "ours, without adapters"
PEFTS = {name: f"transformers and peft, {name}" for name in ("grouped_mm", "eager")}
"""peft on transformers' computations of the experts."""
SPEED_ASKED, MEMORY_ASKED, GROWTH_ASKED, COST_ASKED = 2.0, 0.4, 2.2, 1.25
LARGE_ASKED = 8e9
ADDRESSES = 21 << 30
"""The most memory that peft is given at 4,096 tokens, in bytes: what the machine has but for its system."""


@dataclass(frozen=True)
class Step:
    """What a step on a number of tokens took.

    Attributes:
        seconds: how long.
        peak: the most memory above what the process held when the model was there, in bytes.
        resident: the most memory of the process, in bytes.
        loss: of the first step.
        norm: of the gradients of all adapters together, in the first step.
    """

    seconds: float
    peak: int
    resident: int
    loss: float
    norm: float


@functools.cache
def checkpoint(folder: Path, size: str, layers: int | None) -> Path:
    """A random checkpoint in the released format."""
    made: Path = random_checkpoint(folder / f"{size} {layers}", size, layers=layers, progress=True)
    return made


@functools.cache
def adapter(folder: Path, size: str) -> Path:
    """An adapter for it, whose second factors are not zero."""
    model = with_lora(load(checkpoint(folder, size, None)), rank=RANK)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.02)
    save_adapter(model, folder / "adapter")
    return folder / "adapter"


def trains(model: Any) -> Callable[[int], Step]:
    """What makes steps of a model, of so many tokens each."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    if optimizer is None:
        model.enable_input_require_grads()
    held = resident("VmRSS")

    def run(num_tokens: int) -> Step:
        generator = torch.Generator().manual_seed(num_tokens)
        ids = torch.randint(2, model.config.vocab_size - 8, (1, num_tokens), generator=generator).to(model.device)
        found: list[float] = []

        def step() -> None:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            norms = [parameter.grad.norm() for parameter in trained]
            found[:] = [loss.item(), torch.stack(norms).norm().item() if norms else 0.0]
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        forget_peak()
        taken = seconds(step)
        peak = resident("VmHWM")
        return Step(taken, peak - held, peak, *found)

    return run


def ours(path: Path, adapter: Path | None, *, lora: bool = True) -> Callable[[int], Step]:
    """Packed experts, flash attention, chunked loss; with an adapter, or a new one, or frozen altogether."""
    model: Any = load(path, with_mxfp4_experts(), with_flash_attention(), with_chunked_loss(), device=device())
    if adapter is not None:
        load_adapter(model, adapter)
    elif lora:
        with_lora(model, rank=RANK)
    else:
        model.requires_grad_(False)
    return trains(model)


def peft(path: Path, adapter: Path, implementation: str, limit: int | None = None) -> Callable[[int], Step]:
    """transformers' model with the same adapter by peft; with a limit to the memory that it may ask for."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    from peft import PeftModel

    if limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    model = load(path, device=device())
    model.set_experts_implementation(implementation)
    return trains(PeftModel.from_pretrained(model, adapter, is_trainable=True))


def in_turn(made: Mapping[str, Apart], repeats: int, num_tokens: int) -> dict[str, list[Step]]:
    """The steps of all contenders, who take turns; of a first turn, which warms up, and of so many more."""
    found: dict[str, list[Step]] = {name: [] for name in made}
    for _ in tqdm(range(repeats + 1), desc="turns"):
        for name, one in made.items():
            found[name].append(one.ask(num_tokens))
    for one in made.values():
        one.close()
    return found


def times_of(found: Mapping[str, Sequence[Step]]) -> dict[str, list[float]]:
    """The seconds of all steps but the first."""
    return {name: [step.seconds for step in steps[1:]] for name, steps in found.items()}


def speeds(times: Mapping[str, Sequence[float]], num_tokens: int) -> Point:
    """What a point tells of times on so many tokens."""
    return {
        "tokens": num_tokens,
        "seconds": {name: [round(one, 3) for one in some] for name, some in times.items()},
        "tokens/s": {name: round(num_tokens / statistics.median(some), 1) for name, some in times.items()},
    }


@dataclass(frozen=True)
class BesidePeft(Case):
    """A step of so many tokens, in turn."""

    folder: Path
    size: str
    num_tokens: int
    columns = """
        case   | contender | tokens/s    | speed        | asked     | above the weights | memory        | asked
        {case} | {name}    | {rate:,.0f} | {speed:.2f}x | {fast:g}x | {peak!G:.2f} GB   | {memory:.2f}x | <= {small:g}x
    """

    def setup(self) -> dict[str, Apart]:
        at = checkpoint(self.folder, self.size, None), adapter(self.folder, self.size)
        peers = {name: Apart(peft, *at, implementation) for implementation, name in PEFTS.items()}
        return {OURS: Apart(ours, *at), **peers}

    def run(self, made: dict[str, Apart], repeats: int) -> list[Point]:
        found = in_turn(made, repeats, self.num_tokens)
        times = times_of(found)
        peaks = {name: max(step.peak for step in steps) for name, steps in found.items()}
        best = min(PEFTS.values(), key=lambda name: statistics.median(times[name]))
        return [
            {
                **speeds(times, self.num_tokens),
                "speed ratio": round(median_ratio(times[best], times[OURS]), 2),
                "asked speed ratio": SPEED_ASKED,
                "peak bytes above the weights": peaks,
                "memory ratio": round(peaks[OURS] / min(peaks[name] for name in PEFTS.values()), 3),
                "asked memory ratio": MEMORY_ASKED,
                "loss": {name: steps[0].loss for name, steps in found.items()},
                "gradient norm": {name: steps[0].norm for name, steps in found.items()},
            }
        ]

    def verify(self, made: Any, points: list[Point]) -> None:
        """The same loss and gradients as peft's, from the same adapter, as near as bfloat16 allows."""
        for what, allowed in (("loss", 2e-3), ("gradient norm", 3e-2)):
            values = points[0][what]
            for name in PEFTS.values():
                assert abs(values[OURS] / values[name] - 1) < allowed, (what, values)

    def rows(self, points: list[Point]) -> Iterable[Mapping[str, Any]]:
        point = points[0]
        for name, rate in point["tokens/s"].items():
            shown = {"name": name, "rate": rate, "peak": point["peak bytes above the weights"][name]}
            asked = {"fast": SPEED_ASKED, "small": MEMORY_ASKED}
            ratios = {"speed": point["speed ratio"], "memory": point["memory ratio"]}
            yield {**shown, **(ratios | asked if name == OURS else {})}

    def missed(self, points: list[Point]) -> list[str]:
        speed, memory = points[0]["speed ratio"], points[0]["memory ratio"]
        slow = [f"{speed} times peft's speed, of {SPEED_ASKED}"] if speed < SPEED_ASKED else []
        return slow + ([f"{memory} of peft's memory, of {MEMORY_ASKED}"] if memory > MEMORY_ASKED else [])


@dataclass(frozen=True)
class Lengths(Case):
    """Longer and longer sequences, once each; and peft at one length, as far as the machine's memory goes."""

    folder: Path
    size: str
    lengths: Sequence[int]
    with_peft: int
    columns = """
        case   | tokens     | tokens/s    | above the weights | growth        | asked         | transformers and peft
        {case} | {tokens:,} | {rate:,.0f} | {peak!G:.2f} GB   | {growth:.2f}x | <= {asked:g}x | {peer}
    """

    def run(self, made: Any, repeats: int) -> list[Point]:
        at = checkpoint(self.folder, self.size, None), adapter(self.folder, self.size)
        points: list[Point] = []
        for num_tokens in tqdm(self.lengths, desc="lengths"):
            with closing(Apart(ours, *at)) as one:
                step = [one.ask(num_tokens) for _ in range(2)][-1]
            growth = step.peak / points[-1]["peak bytes above the weights"] if points else None
            points.append(
                {
                    "tokens": num_tokens,
                    "tokens/s": round(num_tokens / step.seconds, 1),
                    "peak bytes above the weights": step.peak,
                    "growth": growth and round(growth, 2),
                    "asked growth": GROWTH_ASKED,
                    "loss": step.loss,
                }
            )
        peer = next(point for point in points if point["tokens"] == self.with_peft)
        peer["transformers and peft"] = self.of_peft(*at)
        return points

    def of_peft(self, *at: Path) -> str:
        """What became of a step by peft."""
        try:
            with closing(Apart(peft, *at, "grouped_mm", ADDRESSES)) as one:
                step = one.ask(self.with_peft)
        except (RuntimeError, MemoryError, EOFError) as error:
            return f"fails with {ADDRESSES >> 30} GiB: {str(error).splitlines()[0][:80] if str(error) else 'killed'}"
        return f"{self.with_peft / step.seconds:,.0f} tokens/s, {step.peak / 1e9:.1f} GB above the weights"

    def verify(self, made: Any, points: list[Point]) -> None:
        """The loss of random tokens by a random model is about that of chance at every length."""
        losses = [point["loss"] for point in points]
        assert max(losses) < 1.05 * min(losses), losses

    def rows(self, points: list[Point]) -> Iterable[Mapping[str, Any]]:
        for point in points:
            peak, asked = point["peak bytes above the weights"], GROWTH_ASKED if point["growth"] else None
            shown = {"rate": point["tokens/s"], "peak": peak, "asked": asked}
            yield {**point, **shown, "peer": point.get("transformers and peft", "")}

    def missed(self, points: list[Point]) -> list[str]:
        return [
            f"memory grows {point['growth']} times to {point['tokens']} tokens, of {GROWTH_ASKED}"
            for point in points
            if (point["growth"] or 0) > GROWTH_ASKED
        ]


@dataclass(frozen=True)
class Adapters(Case):
    """The 20b's shapes with adapters on everything, and without any: forward and backward, in turn."""

    folder: Path
    size: str
    layers: int
    num_tokens: int
    columns = """
        case   | tokens/s    | without adapters | their cost   | asked         | memory of the process | asked
        {case} | {rate:,.0f} | {frozen:,.0f}    | {cost:.2f}x  | <= {most:g}x  | {resident!G:.2f} GB   | {large}
    """

    def setup(self) -> dict[str, Apart]:
        path = checkpoint(self.folder, self.size, self.layers)
        return {OURS: Apart(ours, path, None), FROZEN: Apart(ours, path, None, lora=False)}

    def run(self, made: dict[str, Apart], repeats: int) -> list[Point]:
        found = in_turn(made, repeats, self.num_tokens)
        times = times_of(found)
        return [
            {
                "layers": self.layers,
                **speeds(times, self.num_tokens),
                "cost": round(median_ratio(times[OURS], times[FROZEN]), 3),
                "asked cost": COST_ASKED,
                "peak bytes of the process": max(step.resident for step in found[OURS]),
                "asked peak bytes": LARGE_ASKED if self.size == "20b" else None,
                "loss": {name: steps[0].loss for name, steps in found.items()},
            }
        ]

    def verify(self, made: Any, points: list[Point]) -> None:
        """Adapters that begin with zeros leave the loss as it is."""
        losses = points[0]["loss"]
        assert abs(losses[OURS] / losses[FROZEN] - 1) < 1e-3, losses

    def rows(self, points: list[Point]) -> Iterable[Mapping[str, Any]]:
        point = points[0]
        rates, asked = point["tokens/s"], point["asked peak bytes"]
        yield {
            "rate": rates[OURS],
            "frozen": rates[FROZEN],
            "cost": point["cost"],
            "most": COST_ASKED,
            "resident": point["peak bytes of the process"],
            "large": f"<= {asked / 1e9:g} GB" if asked else "",
        }

    def missed(self, points: list[Point]) -> list[str]:
        point = points[0]
        peak, asked = point["peak bytes of the process"], point["asked peak bytes"]
        cost = [f"adapters cost {point['cost']}, of {COST_ASKED}"] if point["cost"] > COST_ASKED else []
        return cost + ([f"{peak / 1e9:.2f} GB, of {asked / 1e9:g}"] if asked and peak > asked else [])


def cases(settings: case.Settings, folder: Path) -> list[Case]:
    """All cases on a CPU."""
    return [
        BesidePeft("1,024 tokens, 8 layers", folder, "medium", 1024),
        Lengths("by length, 8 layers", folder, "medium", (1024, 2048, 4096, 8192), 4096),
        Adapters("8 layers", folder, "medium", 8, 1024),
        Adapters("20b shapes, 4 layers", folder, "20b", 4, 2048),
    ]


SETTINGS = case.Settings()

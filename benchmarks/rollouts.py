"""Completions of one step of GRPO by the batcher, beside transformers' generate, on the very model that is trained.

Both complete the same prompts, each as often as a group is large, on one model in one process, with adapters on packed
experts. Completions end at an id drawn by chance (one of every few is an end), or all at the same length.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import case
from benchmarks.case import Case, Point
from benchmarks.harness import alternate, device, median_ratio
from gptoss_opt import Rollouts, load, with_flash_attention, with_lora, with_mxfp4_experts
from gptoss_opt.testing import random_checkpoint

RANK, GREEDY_TOKENS = 8, 32
OURS, THEIRS = "Rollouts", "transformers' generate"
ASKED = 1.0


@dataclass(frozen=True)
class Settings(case.Settings):
    """What the command line can set.

    Attributes:
        size: that of the random checkpoint, as `gptoss_opt.testing.SIZES` has it.
        prompts: how many prompts a step has.
        group: how many completions each gets.
        prompt_tokens: the length of a prompt.
        new_tokens: the length of a completion, at most.
    """

    size: str = "medium"
    prompts: int = 4
    group: int = 8
    prompt_tokens: int = 256
    new_tokens: int = 128


def policy(path: Path, dtype: torch.dtype) -> Any:
    """The model with adapters that are not where they began."""
    model = with_lora(load(path, with_mxfp4_experts(), with_flash_attention(), dtype=dtype, device=device()), rank=RANK)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.02)
    return model.eval()


def by_us(model: Any, prompts: Tensor, **options: Any) -> tuple[Tensor, Rollouts]:
    """The prompts with their completions, and what made them."""
    rollouts = Rollouts()
    with rollouts.generating(model):
        return model.generate(prompts, **options), rollouts


@dataclass(frozen=True)
class Step(Case):
    """The rollouts of one step.

    Attributes:
        settings: how many prompts, and of what lengths.
        folder: where the checkpoint is written.
        end_every: one of so many ids ends a completion; None lets only the length end it.
    """

    settings: Settings
    folder: Path
    end_every: int | None
    columns = """
        case   | contender | tokens/s    | seconds        | speed        | asked
        {case} | {name}    | {rate:,.0f} | {seconds:.2f} | {speed:.2f}x | > {asked:g}x
    """

    def setup(self) -> Any:
        return random_checkpoint(self.folder / self.name, self.settings.size)

    def prompts(self, model: Any) -> Tensor:
        """Random prompts, each as often as a group is large [prompts * group, prompt_tokens]."""
        generator = torch.Generator().manual_seed(0)
        shape = self.settings.prompts, self.settings.prompt_tokens
        ids = torch.randint(2, model.config.vocab_size - 8, shape, generator=generator)
        return ids.repeat_interleave(self.settings.group, dim=0).to(model.device)

    def options(self, model: Any) -> dict[str, Any]:
        """How completions are sampled and end."""
        vocab_size = model.config.vocab_size
        ends = [vocab_size] if self.end_every is None else [*range(0, vocab_size, self.end_every)]
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return {**sampling, "max_new_tokens": self.settings.new_tokens, "eos_token_id": ends}

    def run(self, made: Any, repeats: int) -> list[Point]:
        model = policy(made, torch.bfloat16)
        prompts, options = self.prompts(model), self.options(model)
        counts: dict[str, list[int]] = {OURS: [], THEIRS: []}

        def count(name: str, rows: Tensor) -> None:
            ends = torch.isin(rows[:, prompts.shape[1] :], torch.tensor(options["eos_token_id"]).to(rows))
            counts[name].append(int(((ends.cumsum(1) - ends.long()) == 0).sum()))

        def ours() -> None:
            rows, rollouts = by_us(model, prompts, **options)
            count(OURS, rows)
            shared.append(rollouts.stats.prefix_tokens if rollouts.stats else 0)

        def theirs() -> None:
            count(THEIRS, model.generate(prompts, attention_mask=torch.ones_like(prompts), **options))

        shared: list[int] = []
        times = alternate({OURS: ours, THEIRS: theirs}, repeats)
        # Draws differ, and so do lengths: what is compared is the time of a token. The first turn warms up.
        of_token = {name: [t / n for t, n in zip(times[name], counts[name][1:], strict=True)] for name in times}
        return [
            {
                "size": self.settings.size,
                "completions": len(prompts),
                "prompt tokens": prompts.shape[1],
                "seconds": {name: [round(one, 3) for one in some] for name, some in times.items()},
                "tokens": {name: some[1:] for name, some in counts.items()},
                "tokens/s": {name: round(1 / statistics.median(some), 1) for name, some in of_token.items()},
                "prefix tokens": shared[-1],
                "ratio": round(median_ratio(of_token[THEIRS], of_token[OURS]), 2),
                "asked ratio": ASKED,
            }
        ]

    def verify(self, made: Any, points: list[Point]) -> None:
        """In float32, the greedy tokens are the same, and other adapters give others."""
        model = policy(made, torch.float32)
        prompts = self.prompts(model)[:: self.settings.group]
        options = {"max_new_tokens": min(GREEDY_TOKENS, self.settings.new_tokens), "do_sample": False}
        expected = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
        assert torch.equal(by_us(model, prompts, **options)[0], expected), "the greedy tokens differ"
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B"):
                    parameter.mul_(-5)
        other = by_us(model, prompts, **options)[0]
        assert other.shape != expected.shape or not torch.equal(other, expected), "the adapters do not count"

    def rows(self, points: list[Point]) -> Iterable[Mapping[str, Any]]:
        point = points[0]
        for name, rate in point["tokens/s"].items():
            ratios = {"speed": point["ratio"], "asked": ASKED} if name == OURS else {}
            yield {"name": name, "rate": rate, "seconds": statistics.median(point["seconds"][name]), **ratios}

    def missed(self, points: list[Point]) -> list[str]:
        ratio = points[0]["ratio"]
        return [f"{self.name}: {ratio} times the speed of generate"] if ratio <= ASKED else []


def cases(settings: Settings, folder: Path) -> list[Case]:
    """Completions of one length, and of lengths by chance."""
    half = max(settings.new_tokens // 2, 1)
    return [
        Step("completions of one length", settings, folder, None),
        Step("lengths by chance", settings, folder, half),
    ]


SETTINGS = Settings()

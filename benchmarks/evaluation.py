"""Multiple choice after many examples: `BatcherLM` beside the lm-evaluation-harness's own HFLM, on the same model."""

from __future__ import annotations

import random
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from benchmarks.case import Case, Point, Settings
from benchmarks.harness import alternate, device, median_ratio
from gptoss_opt import load, with_flash_attention, with_mxfp4_experts
from gptoss_opt.testing import SIZES, Size, random_checkpoint

ASKED = 2.0
ALLOWED = 1e-3
NUM_CHOICES, NUM_TOKENS = 4, 6
"""The answers to each question, and the tokens of each."""

Request = tuple[tuple[str, str], list[int], list[int]]
"""The texts of a request, which are not needed here, and the ids of its context and of its continuation."""

Answers = list[tuple[float, bool]]
"""Log-likelihoods, and whether each is of the likeliest tokens."""


class Both(NamedTuple):
    """The model, and who asks it."""

    model: Any
    hf: Any
    ours: Any


@dataclass(frozen=True)
class EvaluationSettings(Settings):
    """The shape of the task.

    Attributes:
        questions: how many there are, with four answers each.
        shots: how many tokens of examples they have in common.
        size: the checkpoint's, see `gptoss_opt.testing.SIZES`.
        batch: the batch size of HFLM.
    """

    questions: int = 16
    shots: int = 512
    size: str = "small"
    batch: int = 8


@dataclass(frozen=True)
class Choices(Case):
    """The log-likelihoods of all answers, by both in turn."""

    folder: Path
    settings: EvaluationSettings
    columns = """
        case   | answers   | HFLM              | BatcherLM        | ratio        | asked        | largest difference
        {case} | {answers} | {hf:.2f} s        | {ours:.2f} s     | {ratio:.2f}x | >= {asked:g}x | {difference:.1e}
    """

    def requests(self) -> list[Request]:
        """Answers of `NUM_TOKENS` tokens to questions of 32 to 64, after the same examples."""
        draw, vocabulary = random.Random(0), SIZES[self.settings.size].bos

        def some(count: int) -> list[int]:
            return [draw.randrange(vocabulary) for _ in range(count)]

        shots, found = some(self.settings.shots), list[Request]()
        for _ in range(self.settings.questions):
            context = [*shots, *some(draw.randint(32, 64))]
            found += [(("", ""), context, some(NUM_TOKENS)) for _ in range(NUM_CHOICES)]
        return found

    def setup(self) -> Both:
        if find_spec("lm_eval") is None:
            raise SystemExit("this benchmark needs the lm-evaluation-harness: pip install lm-eval.")
        from lm_eval.models.huggingface import HFLM

        from gptoss_opt.evaluation import BatcherLM

        size = self.settings.size
        folder = random_checkpoint(self.folder / size, size)
        # Both have all wrappers: they differ in how they ask alone.
        model = load(folder, with_mxfp4_experts(), with_flash_attention(), dtype=torch.float32, device=device())
        tokenizer = numbers(SIZES[size])
        hf = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.settings.batch, device=str(device()))
        return Both(model, hf, BatcherLM(model, tokenizer=tokenizer))

    def run(self, made: Both, repeats: int) -> list[Point]:
        requests = self.requests()

        def ours() -> Answers:
            made.ours.batcher.clear_prefixes()  # what the turn before computed
            answers: Answers = made.ours._loglikelihood_tokens(requests, disable_tqdm=True)
            return answers

        times = alternate(
            {"hf": lambda: made.hf._loglikelihood_tokens(requests, disable_tqdm=True), "ours": ours}, repeats
        )
        seconds = {name: round(median(some), 3) for name, some in times.items()}
        ratio = round(median_ratio(times["hf"], times["ours"]), 2)
        return [{"answers": len(requests), **seconds, "ratio": ratio, "asked": ASKED}]

    def verify(self, made: Both, points: list[Point]) -> None:
        """Both give the same numbers, and other answers get other ones."""
        requests = self.requests()
        hf = made.hf._loglikelihood_tokens(requests, disable_tqdm=True)
        ours = made.ours._loglikelihood_tokens(requests, disable_tqdm=True)
        assert [greedy for _, greedy in hf] == [greedy for _, greedy in ours]
        points[0]["difference"] = difference(hf, ours)
        assert points[0]["difference"] <= ALLOWED, points[0]
        assert difference(hf, [*ours[1:], ours[0]]) > 100 * ALLOWED, "the measure does not tell other answers apart"
        made.ours.close()

    def missed(self, points: list[Point]) -> list[str]:
        ratio = points[0]["ratio"]
        return [f"{self.name}: {ratio:.2f} times as fast as HFLM, not {ASKED:g}"] * (ratio < ASKED)


def difference(some: Answers, others: Answers) -> float:
    """The largest difference of two log-likelihoods."""
    return max(abs(a - b) for (a, _), (b, _) in zip(some, others, strict=True))


def numbers(size: Size) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the ids, which both need and are not asked to use."""
    words = Tokenizer(WordLevel({str(n): n for n in range(size.vocab)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=str(size.eos), pad_token=str(size.pad))


def cases(settings: EvaluationSettings, folder: Path) -> list[Case]:
    """One case."""
    return [Choices("multiple choice", folder, settings)]


SETTINGS = EvaluationSettings()

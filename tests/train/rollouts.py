"""Trainers of TRL that sample, and a `generate` of transformers that draws with the batcher's numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import trl
from torch import Tensor
from transformers import LogitsProcessor
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

import datasets
from gptoss_opt.serve.options import Options
from gptoss_opt.serve.sampler import Draw, draw
from tests.finetune.chats import tokenizer

SAMPLING = {"temperature": 0.9, "top_p": 0.95, "top_k": 30}
GROUP, NEW, STEPS = 4, 9, 4
# Longer than a page and than the window, and of several lengths.
PROMPTS = ["abcdefghijabcdefghijab", "jihgfedcbajihgfedcbajihg", "aabbccddeeffgghhii", "acegibdfhjacegibdfhjaceg"]
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "max_steps": STEPS,
    "logging_steps": 1,
    "learning_rate": 2e-2,
    "save_strategy": "no",
    "disable_tqdm": True,
    **SAMPLING,
}


def low_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that a policy can learn: the share of ids below 40 among the tokens."""
    return [sum(token < 40 for token in tokens) / len(tokens) for tokens in completion_ids]


def grpo(model: Any, folder: Path, kind: type = trl.GRPOTrainer, template: str | None = None, **options: Any) -> Any:
    """A GRPOTrainer on two prompts at once, each with a group of completions."""
    hook = {"rollout_func": options.pop("rollout_func")} if "rollout_func" in options else {}
    prompts = options.pop("prompts", PROMPTS)
    settings = {"per_device_train_batch_size": 2 * GROUP, "num_generations": GROUP, "max_completion_length": NEW}
    arguments = trl.GRPOConfig(output_dir=str(folder), **{**SETTINGS, **settings, **options})
    data = datasets.Dataset.from_dict({"prompt": prompts})
    given = {"train_dataset": data, "processing_class": tokenizer(template)}
    return kind(model=model, reward_funcs=low_ids, args=arguments, **given, **hook)


def online_dpo(model: Any, reference: Any, folder: Path, **options: Any) -> Any:
    """An OnlineDPOTrainer on two prompts at once."""
    settings = {"per_device_train_batch_size": 2, "max_new_tokens": NEW, "max_length": 64}
    arguments = OnlineDPOConfig(output_dir=str(folder), **{**SETTINGS, **settings, **options})
    data = datasets.Dataset.from_dict({"prompt": PROMPTS})
    return OnlineDPOTrainer(
        model=model,
        ref_model=reference,
        reward_funcs=low_ids,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer(None),
    )


class SameNumbers(LogitsProcessor):
    """Leaves of each row's scores the token alone that the batcher would draw from them, with the same numbers."""

    def __init__(self, num_rows: int) -> None:
        given = [{**SAMPLING, "max_new_tokens": NEW} for _ in range(num_rows)]
        config = trl.GRPOConfig.__mro__ and _nothing_said()
        self.options = [Options.of(1, config, None, **one) for one in given]
        self.num_generated = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        draws = [Draw(one, 0, row.tolist(), self.num_generated) for one, row in zip(self.options, input_ids)]
        self.num_generated += 1
        tokens = torch.tensor([one.token for one in draw(scores, draws)])
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def _nothing_said() -> Any:
    from transformers import GenerationConfig

    return GenerationConfig()


def generates_with_same_numbers(model: Any) -> Any:
    """Let `model.generate` be transformers' own, on its own logits, with the draws of the batcher; returns the model."""
    generate = type(model).generate

    def of_same_numbers(input_ids: Tensor, generation_config: Any, **options: Any) -> Tensor:
        greedy = copy.deepcopy(generation_config)
        greedy.do_sample, greedy.temperature, greedy.top_p, greedy.top_k = False, None, None, None
        processors = [SameNumbers(len(input_ids))]
        return generate(model, input_ids, generation_config=greedy, logits_processor=processors, **options)

    model.generate = of_same_numbers
    return model

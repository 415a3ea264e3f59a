"""Trainers of TRL that sample, and a `generate` of transformers that draws with the batcher's numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

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
CURVES = {
    "grpo": ("reward", "reward_std", "loss", "grad_norm", "entropy", "completions/mean_length"),
    "online dpo": ("objective/scores", "loss", "grad_norm", "logps/chosen", "logps/rejected", "objective/kl"),
}
"""What is compared of what the trainers log."""


def low_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that a policy can learn: the share of ids below 40 among the tokens."""
    return [sum(token < 40 for token in tokens) / len(tokens) for tokens in completion_ids]


def grpo(model: Any, folder: Path, kind: Any = trl.GRPOTrainer, rollouts: Any = None, **options: Any) -> Any:
    """A GRPOTrainer on two prompts at once, each with a group of completions."""
    settings = {"per_device_train_batch_size": 2 * GROUP, "num_generations": GROUP, "max_completion_length": NEW}
    template, prompts = (options.pop(name, default) for name, default in (("template", None), ("prompts", PROMPTS)))
    arguments = trl.GRPOConfig(output_dir=str(folder), **{**SETTINGS, **settings, **options})
    given = {"train_dataset": datasets.Dataset.from_dict({"prompt": prompts}), "processing_class": tokenizer(template)}
    return kind(model=model, reward_funcs=low_ids, args=arguments, rollout_func=rollouts, **given)


def online_dpo(model: Any, reference: Any, folder: Path, **options: Any) -> Any:
    """An OnlineDPOTrainer on two prompts at once."""
    # Its import warns that it is experimental.
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    settings = {"per_device_train_batch_size": 2, "max_new_tokens": NEW, "max_length": 64}
    arguments = OnlineDPOConfig(output_dir=str(folder), **{**SETTINGS, **settings, **options})
    given = {
        "train_dataset": datasets.Dataset.from_dict({"prompt": PROMPTS}),
        "processing_class": tokenizer(None),
    }
    return OnlineDPOTrainer(model=model, ref_model=reference, reward_funcs=low_ids, args=arguments, **given)


def curves(trainer: Any, kind: str) -> dict[str, list[float]]:
    """What a trainer logs while it trains."""
    trainer.train()
    return {name: [row[name] for row in trainer.state.log_history if name in row] for name in CURVES[kind]}


class SameNumbers(LogitsProcessor):
    """Leaves of each row's scores the token alone that the batcher would draw from them, with the same numbers."""

    def __init__(self, num_rows: int) -> None:
        given = {**SAMPLING, "max_new_tokens": NEW}
        self.options = [Options.of(1, GenerationConfig(), None, **given) for _ in range(num_rows)]
        self.num_generated = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        draws = [Draw(one, 0, (), self.num_generated) for one in self.options]
        self.num_generated += 1
        tokens = torch.tensor([one.token for one in draw(scores, draws)])
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def with_same_numbers(model: Any) -> Any:
    """Let `model.generate` be transformers' own, on its own logits, with the draws of the batcher; returns the model.

    Each row has a seed of torch's random numbers, as each prompt of the batcher has; nothing else is drawn from them.
    """
    generate = type(model).generate

    def of_same_numbers(input_ids: Tensor, generation_config: Any, **options: Any) -> Tensor:
        greedy = copy.deepcopy(generation_config)
        greedy.do_sample, greedy.temperature, greedy.top_p, greedy.top_k = False, None, None, None
        processors = [SameNumbers(len(input_ids))]
        out: Tensor = generate(model, input_ids, generation_config=greedy, logits_processor=processors, **options)
        return out

    model.generate = of_same_numbers
    return model

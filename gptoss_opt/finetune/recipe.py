"""What a finetuning is made of: its wrappers, its tokenizer, its device, and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer

from ..checkpoint import Checkpoint
from ..wrappers.chunked_loss import with_chunked_loss
from ..wrappers.flash_attention import with_flash_attention
from ..wrappers.full_finetuning import with_full_finetuning
from ..wrappers.lora import with_lora
from ..wrappers.mxfp4_experts import with_mxfp4_experts
from .options import FinetuneError, Options

Calls = list[tuple[Callable[..., Any], dict[str, Any]]]
"""Functions of this package, and the options that each is called with."""

PEFT = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}
"""The options of adapters, and what a peft.LoraConfig calls them."""


def wrappers_of(options: Options, config: Any) -> Calls:
    """The wrappers of a finetuning, as calls, for a checkpoint with this config: experts that are packed stay so."""
    packed = getattr(config, "quantization_config", None) is not None
    if options.method == "full":
        return [(with_flash_attention, {}), (with_full_finetuning, {}), (with_chunked_loss, {})]
    held: Calls = [(with_mxfp4_experts, {})] if packed else []
    return [*held, (with_flash_attention, {}), (with_lora, _adapters(options)), (with_chunked_loss, {})]


def _adapters(options: Options) -> dict[str, Any]:
    """The options of `with_lora`: those of a peft config, if there is one, except where the command line says more."""
    given = {name: value for name in PEFT if (value := getattr(options, name)) is not None}
    if options.adapter is None:
        return given
    config = {key: value for key, value in options.adapter.items() if value not in (None, False, [], {}, "")}
    if "targets" in given:
        config.pop("target_parameters", None)
    return {"config": {**config, **{PEFT[name]: value for name, value in given.items()}}}


def built(calls: Calls) -> list[Any]:
    """The wrappers that calls give. Raises `FinetuneError` if one cannot be, as by a peft config that is not served."""
    try:
        return [build(**given) for build, given in calls]
    except ValueError as error:
        raise FinetuneError(str(error)) from error


def config_of(options: Options) -> Any:
    """The config of the checkpoint. Raises `CheckpointError` if there is none, `FinetuneError` if rows are too long."""
    config = Checkpoint.open(options.model).config
    if options.context > config.max_position_embeddings:
        raise FinetuneError(
            f"--context is {options.context}, and {options.model} takes {config.max_position_embeddings} tokens at "
            "most. Use a shorter one."
        )
    return config


def tokenizer_of(model: str) -> Any:
    """The tokenizer beside a checkpoint, which has an end token. Raises `FinetuneError` if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        problem = " ".join(str(error).split())
        raise FinetuneError(
            f"{model} has no tokenizer that transformers can read ({problem}). Copy tokenizer.json and "
            "tokenizer_config.json of the released checkpoint into its folder."
        ) from error
    if tokenizer.eos_token_id is None:
        raise FinetuneError(f"the tokenizer of {model} has no end token. Set eos_token in its tokenizer_config.json.")
    return tokenizer


def device_of(options: Options) -> str:
    """The device that is named, else a GPU if there is one."""
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def learning_rate(step: int, num_steps: int, *, highest: float, warmup: float) -> float:
    """The learning rate of step 0, 1, ...: up in a straight line, then down to 0 along half a cosine.

    Args:
        step: the number of the step.
        num_steps: how many there are.
        highest: what it rises to.
        warmup: the part of the steps in which it rises, from 0 to 1.

    Example:
        >>> [round(learning_rate(step, 6, highest=1.0, warmup=1 / 3), 2) for step in range(6)]
        [0.5, 1.0, 1.0, 0.85, 0.5, 0.15]
    """
    rising = math.ceil(warmup * num_steps)
    if step < rising:
        return highest * (step + 1) / rising
    return highest * (1 + math.cos(math.pi * (step - rising) / (num_steps - rising))) / 2

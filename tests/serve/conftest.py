"""A model to be served, and what `generate` makes of prompts one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gptoss_opt import ContinuousBatcher
from tests.helpers import ids, tiny_model

LENGTHS = (3, 17, 40, 1, 64, 25)
NEW = 24


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    return [ids(1, length, seed=length)[0].tolist() for length in LENGTHS]


def alone(model: Any, prompt: list[int], **options: Any) -> list[int]:
    """What transformers' generate makes of a prompt."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()


@pytest.fixture(scope="session")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    """Of the same model, in eager attention."""
    model = tiny_model()
    return [alone(model, prompt) for prompt in prompts]


@pytest.fixture
def serve() -> Iterator[Callable[..., ContinuousBatcher]]:
    """Makes batchers with few rows, of a fresh model or the one given, and closes them."""
    made = []

    def make(model: Any = None, **options: Any) -> ContinuousBatcher:
        settings = {"max_num_sequences": 4, "max_batch_tokens": 64, "kv_memory": 1 << 20, **options}
        made.append(ContinuousBatcher(tiny_model() if model is None else model, **settings))
        return made[-1]

    yield make
    for batcher in made:
        batcher.close()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One character for each id, without spaces between."""
    # transformers tries a tokenizer for stop strings on "abcdef".
    named = [*(chr(0x100 + number) for number in range(122)), *"abcdef"]
    letters = {letter: number for number, letter in enumerate(named)}
    made = Tokenizer(models.WordLevel(letters, unk_token=chr(0x100)))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made)

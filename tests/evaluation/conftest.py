"""A model with its tokenizer, which the harness's own HFLM and `BatcherLM` both evaluate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.finetune.chats import tokenizer
from tests.helpers import tiny_model

if pytest.importorskip("lm_eval", reason="lm-eval is not installed: make test-frameworks"):
    from lm_eval.models.huggingface import HFLM

    from gptoss_opt.evaluation import BatcherLM


def model() -> Any:
    """A random model in float32 for the tokenizer of the chats."""
    return tiny_model(vocab_size=106, pad_token_id=101, eos_token_id=100, bos_token_id=None)


@pytest.fixture(autouse=True)
def _data_sets_in_a_folder_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(autouse=True)
def _without_a_list_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    # The harness asks pip and others for it after each run, for seconds.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="session")
def harness() -> HFLM:
    """The harness's own, without batches: in those a text goes on, past special tokens, until all have their end."""
    return HFLM(pretrained=model(), tokenizer=tokenizer(), batch_size=1, device="cpu")


@pytest.fixture
def ours() -> Iterator[Callable[..., BatcherLM]]:
    """Makes a `BatcherLM` on another model of the same weights, or on the one given, and closes it."""
    made = []

    def make(of: Any = None, **options: Any) -> BatcherLM:
        settings = {"max_num_sequences": 4, "max_batch_tokens": 64, "kv_memory": 1 << 20, **options}
        made.append(BatcherLM(model() if of is None else of, tokenizer=tokenizer(), **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()

"""Serving a model that ranks hold together: the first schedules, the others follow, and all get the same tokens."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from gptoss_opt import ContinuousBatcher, GenerationError, shard_experts, stack_of
from tests.distributed.models import UNEVEN
from tests.distributed.ranks import Ranks
from tests.distributed.test_sharding import WRAPS
from tests.helpers import ids, tiny_model
from tests.serve.conftest import NEW, alone

PROMPTS = [ids(1, length, seed=length)[0].tolist() for length in (3, 17, 40, 17)]
SPLITS = {
    "tensor parallel": lambda ranks: ranks,
    "expert parallel": lambda ranks: 1,
    "tensor, then expert parallel": lambda ranks: ranks,
    "packed on two axes": lambda ranks: 2,
    "all to all": lambda ranks: 1,
}
"""Over how many ranks the heads are spread."""


def all_to_all(model: Any) -> Any:
    return shard_experts(model, dispatch="all_to_all")


def served(name: str) -> dict[str, Any]:
    """What this rank gets from `generate`, and from requests in the background on the first."""
    model = (all_to_all if name == "all to all" else WRAPS[name])(tiny_model(**UNEVEN))
    before = len(stack_of(model))
    batcher = ContinuousBatcher(model, max_num_sequences=3, max_batch_tokens=32, kv_memory=1 << 20)
    leads = batcher._stepper.leads
    found: dict[str, Any] = {"heads": batcher._stepper.engine.runner.memory.keys[0].shape[1]}
    # What the others ask for does not matter.
    found["generate"] = batcher.generate(PROMPTS if leads else [[1]], max_new_tokens=NEW, progress=False)
    with pytest.raises(ValueError, match="prompt 0: the prompt is empty"):
        batcher.generate([[]], progress=False)
    with pytest.raises(RuntimeError, match="this rank follows|submit inside `with batcher:`"):
        batcher.submit(PROMPTS[0])
    with batcher:
        if leads:
            requests = [batcher.submit(prompt, max_new_tokens=NEW) for prompt in PROMPTS]
            requests += [batcher.submit(PROMPTS[0], max_new_tokens=NEW, temperature=2.0, seed=1)]
            found["submit"] = [list(request) for request in requests]
            scored = batcher.submit(PROMPTS[2], max_new_tokens=0, prompt_logprobs=9)
            scored.result()
            found["scores"] = [one.logprob for one in scored.prompt_logprobs]
        else:
            with pytest.raises(RuntimeError, match="this rank follows"):
                batcher.generate(PROMPTS, progress=False)
    assert len(stack_of(model)) == before
    assert not [one for one in threading.enumerate() if one.name == "batcher"]
    with pytest.raises(GenerationError, match="closed"):
        batcher.generate(PROMPTS, progress=False)
    return found


@pytest.mark.parametrize("name", SPLITS)
def test_all_ranks_get_what_one_process_gets(ranks: Ranks, name: str) -> None:
    plain = tiny_model(**UNEVEN)
    expected = [alone(plain, prompt) for prompt in PROMPTS]
    results = ranks(served, name)
    assert [one["generate"] for one in results] == [expected] * ranks.num_ranks
    assert results[0]["submit"][:4] == expected
    assert results[0]["submit"][4] != expected[0]
    with torch.no_grad():
        logprobs = plain(torch.tensor([PROMPTS[2]])).logits[0, -10:-1].double().log_softmax(-1)
    truth = logprobs.gather(-1, torch.tensor(PROMPTS[2][-9:])[:, None])[:, 0]
    assert results[0]["scores"] == pytest.approx(truth.tolist(), abs=1e-5)
    # Each rank keeps the keys of its own heads.
    assert results[0]["heads"] == UNEVEN["num_key_value_heads"] // SPLITS[name](ranks.num_ranks)


def failed(where: str) -> list[str]:
    """What this rank is told when a step fails on all ranks, or when sampling does on the first."""
    model = all_to_all(tiny_model(**UNEVEN))
    batcher = ContinuousBatcher(model, max_num_sequences=3, max_batch_tokens=32, kv_memory=1 << 20)
    engine = batcher._stepper.engine

    def broken(*_: object) -> None:
        raise RuntimeError("it broke")

    if where == "in the forward":
        model.model.norm.register_forward_pre_hook(broken)
    else:
        engine._draw_of = broken
    told = []
    for _ in range(2):
        with pytest.raises(GenerationError) as caught:
            batcher.generate(PROMPTS, progress=False)
        told.append(str(caught.value))
    with pytest.raises(GenerationError, match="closed"), batcher:
        pass
    batcher.close()
    return told


@pytest.mark.parametrize("where", ["in the forward", "in the sampling"])
def test_all_ranks_are_told_of_a_failure_and_closed(ranks: Ranks, where: str) -> None:
    for first, second in ranks(failed, where):
        assert "it broke" in first
        assert "the batcher is closed" in second

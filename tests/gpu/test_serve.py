"""Serving on a GPU: the tokens of `generate`, steps captured in CUDA graphs, and memory that is measured."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from gptoss_opt import ContinuousBatcher, with_fast_experts, with_flash_attention, with_mxfp4_experts
from tests.helpers import ids, tiny_model

pytestmark = pytest.mark.gpu
PROMPTS = [ids(1, length, seed=length)[0].tolist() for length in (3, 17, 40, 1, 64, 25)]
NEW = 24


def alone(model: Any, prompt: list[int]) -> list[int]:
    tokens = torch.tensor([prompt], device="cuda")
    made = model.generate(tokens, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("wrap", [None, with_fast_experts, with_mxfp4_experts])
def test_greedy_is_generate(wrap: Any) -> None:
    # Rows as wide as the packed kernels take on a GPU.
    model = tiny_model(hidden_size=128, intermediate_size=128, head_dim=64).cuda()
    if wrap is not None:
        wrap(model)
    with_flash_attention(model)
    expected = [alone(model, prompt) for prompt in PROMPTS]
    for options in ({}, {"max_batch_tokens": 8, "max_num_sequences": 3}, {"page_size": 1}, {"cuda_graphs": False}):
        batcher = ContinuousBatcher(model, **{"max_num_sequences": 4, "kv_memory": 1 << 22, **options})
        for _ in range(2):
            assert batcher.generate(PROMPTS, max_new_tokens=NEW, progress=False) == expected
        captured = batcher.stats().cuda_graphs
        # torch's product of dense experts in float32 waits for the GPU.
        assert captured.endswith("captured") == (wrap is with_mxfp4_experts and "cuda_graphs" not in options), captured
        assert wrap is not with_fast_experts or "cuda_graphs" in options or "asks how many rows" in captured
        batcher.close()


def test_dense_experts_in_bfloat16_are_captured() -> None:
    judge = tiny_model(hidden_size=128, intermediate_size=128, head_dim=64).cuda()
    model = with_fast_experts(copy.deepcopy(judge).bfloat16())
    with ContinuousBatcher(model, max_num_sequences=4, kv_memory=1 << 22) as batcher:
        made = batcher.generate(PROMPTS, max_new_tokens=NEW, progress=False)
        assert batcher.stats().cuda_graphs.endswith("captured")
    plain = [alone(model, prompt) for prompt in PROMPTS]
    others = [[(token + 1) % judge.config.vocab_size for token in tokens] for tokens in made]

    def regret(outputs: list[list[int]]) -> float:
        """How much less likely than the likeliest the tokens are, on average, to the same model in float32."""
        behind = []
        for prompt, tokens in zip(PROMPTS, outputs, strict=True):
            with torch.no_grad():
                logits = judge(torch.tensor([[*prompt, *tokens]], device="cuda")).logits[0, len(prompt) - 1 : -1]
            behind.append(logits.amax(-1) - logits.gather(-1, torch.tensor(tokens, device="cuda")[:, None])[:, 0])
        return float(torch.cat(behind).mean())

    # Rounding lets ties fall otherwise, in `generate` as well.
    allowed = 2 * regret(plain) + 0.01 * regret(others)
    assert regret(made) <= allowed < regret(others) / 2


def test_steps_in_the_background_are_captured_too() -> None:
    model = with_mxfp4_experts(tiny_model(hidden_size=128, intermediate_size=128, head_dim=64).cuda())
    expected = [alone(model, prompt) for prompt in PROMPTS]
    with ContinuousBatcher(model, max_num_sequences=4, kv_memory=1 << 22) as batcher:
        requests = [batcher.submit(prompt, max_new_tokens=NEW) for prompt in PROMPTS]
        assert [list(request) for request in requests] == expected
        assert batcher.stats().cuda_graphs.endswith("captured")


def test_auto_takes_what_a_step_leaves() -> None:
    model = with_fast_experts(tiny_model(max_position_embeddings=1 << 20).cuda())
    free = torch.cuda.mem_get_info()[0]
    batcher = ContinuousBatcher(model, max_num_sequences=1 << 11)
    assert 0.5 * free < batcher.stats().kv_bytes < 0.95 * free
    batcher.close()


def test_sampling_on_the_device() -> None:
    model = with_fast_experts(tiny_model().cuda())
    batcher = ContinuousBatcher(model, max_num_sequences=4, kv_memory=1 << 22)
    options = {"max_new_tokens": NEW, "temperature": 1.5, "top_p": 0.9, "seed": 3, "logprobs": 2}
    together = [batcher.submit(prompt, **options) for prompt in PROMPTS]
    assert [one.result() for one in together] == [batcher.submit(prompt, **options).result() for prompt in PROMPTS]
    assert all(len(one.logprobs) == len(one.tokens) for one in together)
    batcher.close()

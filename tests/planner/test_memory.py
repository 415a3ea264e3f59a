"""Bytes in closed form, beside what models and caches really hold."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import DynamicCache, GptOssConfig

from gptoss_opt import (
    compose,
    with_full_finetuning,
    with_lora,
    with_mxfp4_experts,
)
from gptoss_opt.planner.cache import cache_bytes
from gptoss_opt.planner.parameters import parameters_of
from tests.helpers import WINDOW, held_by_kind, ids, tiny_model

STACKS = {
    "dense": compose(),
    "packed": compose(with_mxfp4_experts()),
    "adapters": compose(with_mxfp4_experts(), with_lora(rank=4)),
    "all": compose(with_full_finetuning()),
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parameters_of_one_process(name: str, dtype: torch.dtype) -> None:
    plain = tiny_model(dtype)
    found = parameters_of(plain, STACKS[name])
    model = STACKS[name](plain)
    exact = held_by_kind(model)
    assert found.weights == exact
    assert found.num_bytes == sum(exact.values())
    trainable = Counter(p.element_size() for p in model.parameters() if p.requires_grad for _ in range(p.numel()))
    assert (found.dense if name == "all" else found.trainable if name == "adapters" else {}) == (
        trainable if name in ("all", "adapters") else {}
    )


@pytest.mark.parametrize("context", [1, WINDOW - 1, WINDOW, 3 * WINDOW])
@pytest.mark.parametrize("batch", [1, 3])
def test_keys_and_values(context: int, batch: int) -> None:
    model, exact = tiny_model(), Counter()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids()[:1, :1].repeat(batch, context), past_key_values=cache)
    for type_of_layer, layer in zip(model.config.layer_types, cache.layers, strict=True):
        exact[type_of_layer] += layer.keys.nbytes + layer.values.nbytes
    assert cache_bytes(model.config, context=context, batch=batch, itemsize=4) == exact
    half = cache_bytes(model.config, context=context, batch=batch, itemsize=4, share=0.5)
    assert {name: 2 * each for name, each in half.items()} == exact


def test_the_released_shapes() -> None:
    found = cache_bytes(GptOssConfig(num_hidden_layers=36), context=131_072)
    # 18 layers with all tokens, 18 with 127: 8 heads of 64 values, keys and values, two bytes each.
    assert found == {"sliding_attention": 18 * 127 * 2048, "full_attention": 18 * 131_072 * 2048}

"""A batcher notices that the model changed, matches stop strings as `generate` does, and gives the model back."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import BatchEncoding

from gptoss_opt import ContinuousBatcher, GenerationError, stack_of, with_flash_attention, with_mxfp4_experts
from tests.helpers import ids, tiny_model
from tests.serve.conftest import alone

# Of peft, which asks transformers in words that it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Serve = Callable[..., ContinuousBatcher]
PROMPT = ids(1, 40)[0].tolist()
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "progress": False}


def adapted() -> Any:
    torch.manual_seed(3)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, r=4)
    return get_peft_model(tiny_model(), config).base_model.model


def train(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids(), labels=ids()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def train_fused(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    model(ids(), labels=ids()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def switch(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)


def scale(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_scale("default", 3.0)


def swap(model: Any) -> None:
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.flip(0)


def replace(model: Any) -> None:
    model.model.layers[0].self_attn = tiny_model(seed=5).model.layers[0].self_attn
    with_flash_attention(model)


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "a step of an optimizer": (tiny_model, train),
    "a step of a fused optimizer": (tiny_model, train_fused),
    "an adapter switched off": (adapted, switch),
    "an adapter scaled": (adapted, scale),
    "other data": (tiny_model, swap),
    "another module": (tiny_model, replace),
}


@pytest.mark.parametrize(("make", "change"), CHANGES.values(), ids=CHANGES)
def test_prefixes_of_other_weights_are_forgotten(
    make: Callable[[], Any], change: Callable[[Any], None], serve: Serve
) -> None:
    model = make()
    batcher = serve(model)
    before = batcher.generate([PROMPT], **OPTIONS)
    # Unchanged, the prompt's pages are used again.
    assert batcher.generate([PROMPT], **OPTIONS) == before
    shared = batcher.stats().prefix_tokens
    assert shared > 0
    change(model)
    model.eval()
    after = batcher.generate([PROMPT], **OPTIONS)
    assert batcher.stats().prefix_tokens == shared
    assert after == [alone(model, PROMPT, max_new_tokens=8)] != before
    assert batcher.generate([PROMPT], **OPTIONS) == after
    assert batcher.stats().prefix_tokens > shared


def test_stop_strings_may_begin_in_the_prompt(serve: Serve, tokenizer: Any) -> None:
    model = tiny_model()
    prompt = PROMPT[:9]
    made = alone(model, prompt, max_new_tokens=6)
    text = tokenizer.decode(prompt[-2:] + made[:2])
    elsewhere = tokenizer.decode(prompt[2:5])  # which the prompt holds, and nothing new ends
    batcher = serve(model)
    for strings in ([text], [elsewhere], [elsewhere, text], [tokenizer.decode(made[2:4])]):
        options = {"max_new_tokens": 6, "stop_strings": strings, "tokenizer": tokenizer}
        expected = alone(model, prompt, **options)
        assert batcher.submit(prompt, **options).result() == expected
    assert len(alone(model, prompt, max_new_tokens=6, stop_strings=[text], tokenizer=tokenizer)) == 2


def test_what_a_tokenizer_returns_is_a_prompt(serve: Serve) -> None:
    batcher = serve()
    expected = batcher.generate([PROMPT[:5], PROMPT[:9]], **OPTIONS)
    padded = {
        "input_ids": torch.tensor([[0] * 4 + PROMPT[:5], PROMPT[:9]]),
        "attention_mask": torch.tensor([[0] * 4 + [1] * 5, [1] * 9]),
    }
    for encoded in (
        padded,
        BatchEncoding(padded),
        BatchEncoding({"input_ids": [PROMPT[:5], PROMPT[:9]]}),
        BatchEncoding({"input_ids": [PROMPT[:5], PROMPT[:9]], "attention_mask": [[1] * 5, [1] * 9]}),
    ):
        assert batcher.generate(encoded, **OPTIONS) == expected
    one = BatchEncoding({"input_ids": torch.tensor([PROMPT[:5]]), "attention_mask": torch.ones(1, 5)})
    for encoded in (one, BatchEncoding({"input_ids": PROMPT[:5]})):
        assert batcher.submit(encoded, max_new_tokens=8).result() == expected[0]
    with pytest.raises(ValueError, match="a prompt is one row of token ids, and here are 2"):
        batcher.submit(BatchEncoding(padded))


@pytest.mark.parametrize("packed", [False, True])
def test_a_batcher_that_is_dropped_gives_the_model_back(packed: bool) -> None:
    model = tiny_model().train()
    if packed:
        with_mxfp4_experts(model)
    stack = stack_of(model)
    batcher = ContinuousBatcher(model, kv_memory=1 << 20)
    assert len(stack_of(model)) == len(stack) + 1
    assert not model.training
    expected = batcher.generate([PROMPT], **OPTIONS)[0]
    del batcher  # at once, without waiting for the garbage collector
    assert stack_of(model) == stack
    assert model.training
    # Of one that nobody holds, a request that goes on is completed.
    request = ContinuousBatcher(model, kv_memory=1 << 20).submit(PROMPT, max_new_tokens=8)
    gc.collect()
    assert request.result() == expected
    # A thread that makes the steps does not keep it.
    entered = ContinuousBatcher(model, kv_memory=1 << 20).__enter__()
    waiting = entered.submit(PROMPT, max_new_tokens=8)
    assert waiting.result() == expected
    del entered, waiting, request
    gc.collect()
    assert stack_of(model) == stack


def test_what_is_pending_in_a_dropped_batcher_ends_with_an_error() -> None:
    batcher = ContinuousBatcher(tiny_model(), kv_memory=1 << 20)
    stepper = batcher._stepper
    request = batcher.submit(PROMPT, max_new_tokens=8)
    batcher.close()
    del batcher
    gc.collect()
    with pytest.raises(GenerationError, match="closed"):
        request.result()
    assert stepper.closed is not None

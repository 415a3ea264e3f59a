"""What stands for a model in a plan: one layer for all that are alike, which is as exact as the whole, and quick."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptoss_opt import (
    CompatibilityError,
    Stack,
    compose,
    plan,
    shard_experts,
    shard_tensor_parallel,
    with_full_finetuning,
    with_lora,
    with_mxfp4_experts,
)
from gptoss_opt.layout import LayoutError
from gptoss_opt.model.build import build
from gptoss_opt.planner.parameters import parameters_of
from gptoss_opt.planner.target import target_of
from tests.helpers import tiny_config
from tests.planner.test_memory import STACKS as ALONE

STACKS = {
    **ALONE,
    "adapters of head and attention": compose(with_lora(rank=4, targets=("q_proj", "lm_head"))),
    "sliced": compose(shard_tensor_parallel(degree=2), with_lora()),
    "placed": compose(shard_experts(degree=3), with_lora(), with_mxfp4_experts()),
    "sliced and placed": compose(shard_tensor_parallel(degree=2), shard_experts(degree=2), with_full_finetuning()),
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("changes", [{}, {"vocab_size": 129}, {"attention_bias": False}], ids=str)
def test_one_layer_tells_what_all_take(name: str, changes: dict[str, Any]) -> None:
    # Slices of 96 values over two ranks are of two blocks and one, and a vocabulary of 129 of 65 words and 64: which
    # rank is the fullest depends on how many layers there are.
    config = tiny_config(num_hidden_layers=5, num_local_experts=5, intermediate_size=96, **changes)
    whole = build(config, torch.device("meta"), torch.bfloat16)
    target = target_of(config)
    assert len(list(target.model.modules())) < len(list(whole.modules())) / 2
    assert target.held(STACKS[name]) == parameters_of(whole, STACKS[name])


def test_layers_of_a_model_that_is_there_are_each_looked_at() -> None:
    model = with_lora(build(tiny_config(), torch.device("cpu"), torch.bfloat16), rank=4, layers=(0,))
    target = target_of(model)
    assert target.repeats == 1
    every = parameters_of(build(tiny_config(), torch.device("meta"), torch.bfloat16), compose(with_lora(rank=4)))
    held = target.held(compose(*target.already.values()))
    assert 3 * held.weights["adapters"] == every.weights["adapters"]


@pytest.mark.parametrize("task", ["generate", "lora", "full"])
@pytest.mark.parametrize("hardware", ["16x16GB", "1x24GB", "2x(8xH100)"])
def test_few_layouts_are_computed_and_each_of_one_layer(
    hardware: str, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What fits nowhere takes longest, as one machine after another is tried. A layout of one layer takes a millisecond.
    computed: list[int] = []
    layout = Stack.layout

    def counted(stack: Stack, model: Any) -> Any:
        computed.append(len(list(model.modules())))
        return layout(stack, model)

    monkeypatch.setattr(Stack, "layout", counted)
    assert not plan("120b", hardware=hardware, task=task, context=131_072, batch=256).fits
    assert 0 < len(computed) <= 80
    assert max(computed) < 40


def test_what_cannot_be_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_of(tiny_config())
    stacks = {
        compose(shard_tensor_parallel(degree=3)): LayoutError,
        compose(with_lora(layers=(9,))): CompatibilityError,
    }
    for stack, error in stacks.items():
        with pytest.raises(error) as first:
            target.held(stack)
        with monkeypatch.context() as patch:
            patch.setattr(Stack, "layout", None)
            with pytest.raises(error) as second:
                target.held(stack)
        assert first.value is second.value

"""Parameters that no wrapper knows in modules that are spread over ranks: refused by name, or exact."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model

from gptoss_opt import CompatibilityError, shard_experts, shard_tensor_parallel, with_flash_attention
from tests.distributed.models import UNEVEN
from tests.distributed.ranks import Ranks
from tests.helpers import gradients, ids, relative, tiny_model


def lora(model: Any, *modules: str, **options: Any) -> Any:
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(target_modules=list(modules), init_lora_weights=False, r=4, **options))


def refused_at_the_first_forward(module: str) -> str:
    model = shard_tensor_parallel(tiny_model(**UNEVEN))
    model(ids())
    adapted = lora(model, module)
    with pytest.raises(ValueError, match="spread over ranks") as error:
        adapted(ids())
    adapted.unload()
    model(ids())
    return str(error.value)


@pytest.mark.parametrize("module", ["q_proj", "o_proj"])
def test_adapters_in_sharded_attention_are_refused(ranks: Ranks, module: str) -> None:
    for said in ranks(refused_at_the_first_forward, module):
        assert said.startswith(f"{module}.lora_A.default.weight (and 1 more) was put into a module that is spread"), (
            said
        )


def refused_at_wrapping(module: str) -> str:
    model = lora(tiny_model(**UNEVEN), module).base_model.model
    expected = model(ids()).logits
    with pytest.raises(CompatibilityError) as error:
        shard_tensor_parallel(model)
    assert torch.equal(model(ids()).logits, expected)
    return str(error.value)


@pytest.mark.parametrize("module", ["q_proj", "o_proj"])
def test_adapted_attention_is_not_sharded(ranks: Ranks, module: str) -> None:
    for said in ranks(refused_at_wrapping, module):
        assert f"self_attn.{module}." in said
        assert "stands in a module that is spread over ranks" in said


def adapted_parameters(way: str) -> str:
    wrap = shard_experts if way == "experts" else shard_tensor_parallel
    model = lora(tiny_model(**UNEVEN), "k_proj", target_parameters=["mlp.experts.gate_up_proj"]).base_model.model
    with pytest.raises(CompatibilityError) as error:
        wrap(model)
    return str(error.value)


@pytest.mark.parametrize("way", ["experts", "tensor"])
def test_experts_that_peft_adapts_are_not_spread(ranks: Ranks, way: str) -> None:
    for said in ranks(adapted_parameters, way):
        assert "is adapted by a ParamWrapper around it (peft's target_parameters)" in said


def exact(first: bool) -> float:
    plain = lora(tiny_model(**UNEVEN), "q_proj", "o_proj", "v_proj")
    if first:
        model = lora(tiny_model(**UNEVEN), "q_proj", "o_proj", "v_proj")
        shard_experts(with_flash_attention(model.base_model.model))
    else:
        model = lora(shard_experts(tiny_model(**UNEVEN)), "q_proj", "o_proj", "v_proj")
    found = []
    for one in (model, plain):
        loss = one(ids(), labels=ids()).loss
        loss.backward()
        found.append((loss.detach(), gradients(one)))
    (loss, ours), (expected, wanted) = found
    assert any("lora_A" in name for name in wanted)
    errors = [relative(ours[name], wanted[name]) for name in wanted if "lora" in name]
    return max(relative(loss, expected), *errors)


@pytest.mark.parametrize("first", [True, False], ids=["adapters first", "sharded first"])
def test_adapters_on_linear_layers_beside_sharded_experts_are_exact(ranks: Ranks, first: bool) -> None:
    assert max(ranks(exact, first)) < 1e-4


def offloaded() -> str:
    model = shard_tensor_parallel(tiny_model(**UNEVEN))
    with pytest.raises(ValueError, match="spread over ranks") as error:
        accelerate.cpu_offload(model, execution_device="cpu")
    return str(error.value)


def test_a_sharded_model_is_not_offloaded(ranks: Ranks) -> None:
    for said in ranks(offloaded):
        assert "cannot be made anew or moved, as accelerate's offloading" in said

"""Expert weights of another size, elsewhere, or that are no plain parameters: refused by name, or computed with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

from gptoss_opt import (
    CompatibilityError,
    explain,
    stack_of,
    undo,
    with_fast_experts,
    with_flash_attention,
    with_mxfp4_experts,
)
from gptoss_opt.kernels.experts import ExpertsRequest, PackedWeights
from gptoss_opt.kernels.experts.impl.native import NATIVE
from gptoss_opt.kernels.mxfp4 import pack, unpack
from tests.helpers import gradients, ids, relative, tiny_model

PACKED = {backend: (lambda model, b=backend: with_mxfp4_experts(model, backend=b)) for backend in ("auto", "reference")}
DENSE = {backend: (lambda model, b=backend: with_fast_experts(model, backend=b)) for backend in ("auto", "torch")}
WRAP: dict[str, Callable[[Any], Any]] = {
    **{f"packed {name}": wrap for name, wrap in PACKED.items()},
    **{f"dense {name}": wrap for name, wrap in DENSE.items()},
}


def experts_of(model: Any) -> Any:
    return model.model.layers[0].mlp.experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("projection", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("wrap", WRAP.values(), ids=WRAP)
def test_a_bias_of_another_size_is_refused(wrap: Callable[[Any], Any], projection: str, dtype: torch.dtype) -> None:
    model = wrap(tiny_model(dtype))
    experts = experts_of(model)
    bias = getattr(experts, f"{projection}_bias")
    model(ids())
    for shape in ((2, bias.shape[1]), (4, bias.shape[1] - 32)):
        setattr(experts, f"{projection}_bias", nn.Parameter(torch.zeros(shape, dtype=dtype)))
        with pytest.raises(ValueError, match=rf"{projection}_bias is \[{shape[0]}, {shape[1]}\], and must be"):
            model(ids())
    setattr(experts, f"{projection}_bias", bias)
    model(ids())


@pytest.mark.parametrize("wrap", WRAP.values(), ids=WRAP)
def test_an_expert_past_the_last_is_refused_as_by_transformers(wrap: Callable[[Any], Any]) -> None:
    x, indices, weights = torch.randn(3, 64), torch.tensor([[0, 3], [1, 2], [0, 1]]), torch.rand(3, 2)
    model = wrap(tiny_model())
    assert experts_of(model)(x, indices, weights).isfinite().all()
    with pytest.raises(IndexError, match="router_indices has expert 4, and there are 4"):
        experts_of(model)(x, indices + 1, weights)


def test_weights_that_are_elsewhere_are_refused() -> None:
    model = with_mxfp4_experts(tiny_model())
    experts_of(model).to("meta")
    with pytest.raises(ValueError, match="gate_up_proj_blocks is on meta, and the tokens are on cpu"):
        model(ids())
    with pytest.raises(CompatibilityError, match="gate_up_proj_blocks is on the meta device"):
        undo(model)
    assert len(stack_of(model)) == 1


def test_an_offloaded_model_computes_and_is_not_laid_out_anew() -> None:
    expected = with_mxfp4_experts(tiny_model())(ids()).logits
    model = accelerate.cpu_offload(with_mxfp4_experts(tiny_model()), execution_device="cpu")
    assert relative(model(ids()).logits, expected) < 1e-6
    with pytest.raises(CompatibilityError, match="before offloading"):
        undo(model)
    assert relative(model(ids()).logits, expected) < 1e-6
    assert explain(model).rows[0].wrapper == "with_mxfp4_experts()"
    dense = accelerate.cpu_offload(tiny_model(), execution_device="cpu")
    with pytest.raises(CompatibilityError, match="gate_up_proj is on the meta device"):
        with_mxfp4_experts(dense)


def test_a_backend_is_chosen_by_where_the_computation_runs() -> None:
    model = accelerate.cpu_offload(with_mxfp4_experts(tiny_model()), execution_device="cpu")
    before = explain(model).rows[0].backend
    with_flash_attention(model)
    on_cpu = explain(with_flash_attention(tiny_model())).rows[0].backend
    assert [row.backend for row in explain(model).rows] == [before, on_cpu]
    assert relative(model(ids()).logits, tiny_model()(ids()).logits) < 1e-5
    dense = with_fast_experts(accelerate.cpu_offload(tiny_model(), execution_device="cpu"))
    assert explain(dense).rows[0].backend == explain(with_fast_experts(tiny_model())).rows[0].backend
    assert relative(dense(ids()).logits, tiny_model()(ids()).logits) < 1e-5


# Of transformers, which looks at where the weights sleep.
@pytest.mark.filterwarnings("ignore:You are calling .generate\\(\\) with the `input_ids` being on a device:UserWarning")
def test_what_worked_offloaded_still_does(tmp_path: Any) -> None:
    model = accelerate.cpu_offload(with_mxfp4_experts(tiny_model()), execution_device="cpu")
    tokens = model.generate(ids(1, 5), max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, tiny_model().generate(ids(1, 5), max_new_tokens=4, do_sample=False))
    accelerate.hooks.remove_hook_from_submodules(model)


@dataclass
class Broken:
    """A tensor that native code must not read, and what is said of it."""

    made: Callable[[torch.Tensor], torch.Tensor]
    said: str


BROKEN = {
    "on meta": Broken(lambda x: x.to("meta"), "on meta"),
    "of another class": Broken(lambda x: x.as_subclass(type("Other", (torch.Tensor,), {})), "is a Other, whose memory"),
    "without memory": Broken(lambda x: _freed(x), "has no values: its memory was given back"),
    "sparse": Broken(lambda x: x.to_sparse(), "is (in layout torch.sparse_coo, whose memory|a)"),
}


def _freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("which", ["blocks", "scales", "bias", "x", "indices", "routing_weights"])
def test_the_gate_of_native_code(which: str, broken: Broken) -> None:
    if NATIVE.why_not(ExpertsRequest("cpu", torch.float32)):
        pytest.skip("the native library was not built")
    num_experts, hidden = 4, 64
    given = {
        "blocks": torch.randint(256, (num_experts, 2 * hidden, hidden // 32, 16), dtype=torch.uint8),
        "scales": torch.randint(120, 128, (num_experts, 2 * hidden, hidden // 32), dtype=torch.uint8),
        "bias": torch.randn(num_experts, 2 * hidden),
        "x": torch.randn(3, hidden),
        "indices": torch.tensor([[0, 1], [2, 3], [1, 2]]),
        "routing_weights": torch.rand(3, 2),
    }
    down = PackedWeights(given["blocks"][:, :hidden], given["scales"][:, :hidden], given["bias"][:, :hidden])
    offsets = torch.tensor([1, 2, 3, 3], dtype=torch.int32)

    def run(given: dict[str, torch.Tensor]) -> None:
        gate_up = PackedWeights(given["blocks"], given["scales"], given["bias"])
        with torch.no_grad():
            NATIVE.forward(given["x"], offsets, gate_up)
            NATIVE.fused(given["x"], given["indices"], given["routing_weights"], gate_up, down, 1.702, 7.0)

    run(given)
    with pytest.raises(ValueError, match=broken.said):
        run({**given, which: broken.made(given[which])})


def test_the_gate_of_packing_and_of_attention_on_pages() -> None:
    rows = torch.randn(4, 32)
    blocks, scales = pack(rows)
    with pytest.raises(ValueError, match="weights has no values"):
        pack(_freed(rows))
    with pytest.raises(ValueError, match="blocks has no values"):
        unpack(_freed(blocks), scales)
    with pytest.raises(ValueError, match="scales is a Other"):
        unpack(blocks, scales.as_subclass(type("Other", (torch.Tensor,), {})))


class Twice(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@pytest.mark.parametrize("projection", ["gate_up_proj", "down_proj"])
def test_parametrised_weights(projection: str) -> None:
    def made() -> Any:
        model = tiny_model()
        parametrize.register_parametrization(experts_of(model), projection, Twice())
        return model

    plain = made()(ids()).logits
    assert relative(tiny_model()(ids()).logits, plain) > 1e-3
    assert relative(with_fast_experts(made())(ids()).logits, plain) < 1e-5
    model = made()
    with pytest.raises(CompatibilityError, match=f"asks for model.layers.0.mlp.experts.{projection}, which"):
        with_mxfp4_experts(model)
    assert relative(model(ids()).logits, plain) == 0


# Of peft, which asks transformers in words that it is about to drop.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_experts_that_peft_adapts() -> None:
    def adapted(model: Any) -> Any:
        torch.manual_seed(3)
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = LoraConfig(target_modules=["q_proj"], target_parameters=parameters, init_lora_weights=False, r=4)
        return get_peft_model(model, config).base_model.model

    found = []
    for model in (
        adapted(tiny_model()),
        adapted(with_fast_experts(tiny_model())),
        with_fast_experts(adapted(tiny_model())),
    ):
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    (plain, wanted), *ours = found
    assert sum("lora_A" in name for name in wanted) == 3 * 3
    for loss, got in ours:
        torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
        assert max(relative(got[name], wanted[name]) for name in wanted) < 1e-4
    model = adapted(tiny_model())
    with pytest.raises(
        CompatibilityError, match=r"is adapted by a ParamWrapper around it \(peft's target_parameters\)"
    ):
        with_mxfp4_experts(model)
    torch.testing.assert_close(model(ids(), labels=ids()).loss, plain, rtol=1e-6, atol=0)


@pytest.fixture
def group_of_one(tmp_path: Any) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
def test_what_fsdp_has_sharded_is_not_packed_nor_undone() -> None:
    model = fully_shard(tiny_model())
    with pytest.raises(CompatibilityError, match="gate_up_proj is a DTensor, which something else has made of it"):
        with_mxfp4_experts(model)
    assert not stack_of(model)
    model = fully_shard(with_mxfp4_experts(tiny_model()))
    with pytest.raises(CompatibilityError, match="gate_up_proj_blocks is a DTensor"):
        undo(model)
    assert len(stack_of(model)) == 1
    # After a forward the parameters of the root look like any.
    model(ids())
    with pytest.raises(CompatibilityError, match="gate_up_proj_blocks is (a DTensor|held by FSDP)"):
        undo(model)
    assert len(stack_of(model)) == 1


@pytest.mark.parametrize("wrap", [with_fast_experts, with_mxfp4_experts])
def test_what_deepspeed_holds_is_not_wrapped(wrap: Callable[[Any], Any]) -> None:
    model = tiny_model()
    model.lm_head.weight.ds_id = 0  # as ZeRO-3 marks each parameter that it has taken
    with pytest.raises(CompatibilityError, match="ZeRO-3 holds .* Wrap the model first, then deepspeed.initialize"):
        wrap(model)
    del model.lm_head.weight.ds_id
    assert stack_of(wrap(model))

"""Expert weights of another size, elsewhere, or that are no plain parameters: refused by name, or computed with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

from gptoss_opt import CompatibilityError, explain, stack_of, undo, with_fast_experts, with_mxfp4_experts
from tests.helpers import ids, relative, tiny_model

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
    for model in (tiny_model(), wrap(tiny_model())):
        assert experts_of(model)(x, indices, weights).isfinite().all()
        with pytest.raises(IndexError):
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

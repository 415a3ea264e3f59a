"""Parameters that a wrapper brings, on sharded models: split as what they stand beside, gradients as in one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Shard

from gptoss_opt import (
    CompatibilityError,
    compose,
    gather_state_dict,
    load,
    shard_experts,
    shard_tensor_parallel,
    undo,
    with_mxfp4_experts,
)
from gptoss_opt.distributed import local as local_shards
from gptoss_opt.extend import GPT_OSS, Attachment, Host, Layout, Phase, Report, Wrapper, layout_of
from tests.distributed.models import UNEVEN, whole
from tests.distributed.ranks import Ranks
from tests.distributed.test_sharding import on_2d
from tests.helpers import GOLDEN, ids, relative, tiny_model
from tests.stacks.low_rank import LowRank, low_rank_parameters, train

SHARDS = {
    "tensor parallel": shard_tensor_parallel,
    "expert parallel": shard_experts,
    "both": lambda model: shard_experts(shard_tensor_parallel(model)),
    "two axes": on_2d,
    "packed": lambda model: with_mxfp4_experts(shard_tensor_parallel(model)),
}


def uneven() -> Any:
    """In float64, in which transformers computes experts one by one."""
    model = tiny_model(torch.float64, **UNEVEN)
    model.set_experts_implementation("eager")
    return model


def begun(model: Any) -> Any:
    """With second matrices that are not zero, so that all gradients are."""
    for number, (name, parameter) in enumerate(low_rank_parameters(LowRank()(model)).items()):
        if name.endswith("low_B"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(number))
    return model


def measured(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    out = model(ids(), labels=ids())
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), gradients


def sharded(name: str, first: str) -> dict[str, Any]:
    """Logits and gradients of a model that got its new parameters before or after it was sharded."""
    model = uneven()
    if first == "added":
        model = SHARDS[name](begun(model))
    else:
        model = LowRank()(SHARDS[name](model))
        values = dict(low_rank_parameters(begun(uneven())))
        held = SHARDS[name](begun(uneven()))
        with torch.no_grad():
            for key, parameter in low_rank_parameters(model).items():
                assert parameter.shape == values[key].shape
                parameter.to_local().copy_(held.get_parameter(key).to_local())
    logits, gradients = measured(model)
    split = {
        key: [p.dim for p in parameter.placements if isinstance(p, Shard)]
        for key, parameter in low_rank_parameters(model).items()
        if isinstance(parameter, DTensor)
    }
    return {"logits": logits, "gradients": whole(gradients, model), "split": split}


@pytest.fixture(scope="module")
def exact() -> tuple[Tensor, dict[str, Tensor]]:
    return measured(begun(uneven()))


@pytest.mark.parametrize("first", ["sharded", "added"])
@pytest.mark.parametrize("name", SHARDS)
def test_logits_and_gradients_are_those_of_one_process(ranks: Ranks, exact: Any, name: str, first: str) -> None:
    logits, gradients = exact
    found = ranks(sharded, name, first)
    for one in found:
        assert relative(one["logits"], logits) < 1e-5
    expected = {key for key in gradients if name != "packed" or not key.endswith(("gate_up_proj", "down_proj"))}
    assert found[0]["gradients"].keys() == expected
    for key in expected:
        assert relative(found[0]["gradients"][key], gradients[key]) < 1e-5, key
    split = found[0]["split"]
    assert len(split) == 2 * 4 * UNEVEN["num_hidden_layers"]
    if name != "expert parallel":
        assert split["model.layers.0.self_attn.q_proj.low_B"] == [0]
        assert split["model.layers.0.self_attn.q_proj.low_A"] == []
        assert split["model.layers.0.self_attn.o_proj.low_A"] == [1]
        assert split["model.layers.0.self_attn.o_proj.low_B"] == []


@dataclass(frozen=True, kw_only=True, repr=False)
class Shifted(Wrapper):
    """Adds to the bias of attention's last projection, and to that of the experts'."""

    name: ClassVar[str] = "with_toy_shift"
    phase: ClassVar[Phase] = Phase.ADAPT
    host: ClassVar[Host] = GPT_OSS

    def biases(self, model: Any, layout: Layout) -> list[str]:
        return [name for name in layout if name.endswith(("o_proj.bias", "down_proj_bias"))]

    def layout(self, model: Any, layout: Layout) -> Layout:
        for bias in self.biases(model, layout):
            shape = layout.form(bias).shape
            dims = {dim: dim for dim in range(len(shape))}
            layout = layout.add(f"{bias}_shift", shape, init="ones", beside=bias, dims=dims)
        return layout

    def attach(self, model: Any, journal: Attachment) -> Report:
        for bias in self.biases(model, layout_of(model)):
            if bias.endswith("o_proj.bias"):
                journal.around(model, bias.removesuffix(".bias"), shifted, None)
        return Report(("biases: a shift beside each",))


def shifted(_: None, module: Any, inner: Any, x: Tensor) -> Tensor:
    return inner(x) + module.bias_shift


def shifted_and_sharded(name: str) -> dict[str, Any]:
    model = SHARDS[name](Shifted()(uneven()))
    logits, gradients = measured(model)
    return {"logits": logits, "gradients": whole(gradients, model)}


@pytest.mark.parametrize("name", ["tensor parallel", "both", "two axes"])
def test_what_is_added_once_stays_so(ranks: Ranks, name: str) -> None:
    logits, gradients = measured(Shifted()(uneven()))
    assert relative(logits, measured(uneven())[0]) > 1e-2
    found = ranks(shifted_and_sharded, name)
    for one in found:
        assert relative(one["logits"], logits) < 1e-5
    for key, gradient in gradients.items():
        assert relative(found[0]["gradients"][key], gradient) < 1e-5, key


def other_layouts() -> str:
    model = compose(LowRank(), Shifted(), shard_tensor_parallel())(uneven())
    try:
        undo(model, LowRank() if distributed.get_rank() == 0 else Shifted())
    except CompatibilityError as error:
        return str(error)
    return ""


def test_ranks_agree_on_what_is_taken_off(ranks: Ranks) -> None:
    for told in ranks(other_layouts):
        assert "with_toy_shift, shard_tensor_parallel" in told
        assert "with_toy_low_rank, shard_tensor_parallel" in told


def without_the_sum(name: str) -> dict[str, Tensor]:
    real = local_shards.all_reduce_gradient
    local_shards.all_reduce_gradient = lambda x, group: x
    try:
        return sharded(name, "added")["gradients"]
    finally:
        local_shards.all_reduce_gradient = real


def test_a_gradient_that_is_not_summed_is_noticed(ranks: Ranks, exact: Any) -> None:
    found = ranks(without_the_sum, "tensor parallel")[0]
    wrong = {key for key, gradient in found.items() if relative(gradient, exact[1][key]) > 1e-2}
    assert {key.rpartition(".")[2] for key in wrong} == {"low_A", "low_B"}
    assert all(key.endswith("o_proj.low_B") == key.endswith("low_B") for key in wrong)


def trained_then_sharded() -> tuple[Tensor, dict[str, Tensor | None]]:
    """Trained for two steps on one rank each, alike; then sharded, and saved."""
    model = LowRank()(uneven())
    train(model, [ids(seed=3), ids(seed=4)])
    shard_tensor_parallel(model)
    return model(ids()).logits.detach(), dict(gather_state_dict(model))


def test_trained_before_it_was_sharded(ranks: Ranks) -> None:
    model = LowRank()(uneven())
    train(model, [ids(seed=3), ids(seed=4)])
    found = ranks(trained_then_sharded)
    for logits, _ in found:
        assert relative(logits, model(ids()).logits) < 1e-5
    state = found[0][1]
    assert all(relative(state[key], value) < 1e-12 for key, value in model.state_dict().items())


def loaded() -> list[Tensor]:
    model = load(GOLDEN, LowRank(), shard_tensor_parallel(degree=2), with_mxfp4_experts(), dtype=torch.float32)
    after = LowRank()(load(GOLDEN, shard_tensor_parallel(degree=2), with_mxfp4_experts(), dtype=torch.float32))
    pairs = zip(model.state_dict().items(), after.state_dict().items(), strict=True)
    assert all(key == other and torch.equal(a.to_local(), b.to_local()) for (key, a), (other, b) in pairs)
    return [parameter.to_local().detach() for parameter in low_rank_parameters(model).values()]


def test_added_while_loading(ranks: Ranks) -> None:
    alone = compose(LowRank()).layout(tiny_model()).new
    assert all(len(found) == len(alone) for found in ranks(loaded))

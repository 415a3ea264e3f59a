"""`verify` of models that several ranks hold together: right, and faults of one rank that all of them find."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from gptoss_opt import (
    Verification,
    compose,
    init_distributed,
    shard_experts,
    shard_tensor_parallel,
    verify,
    with_fast_experts,
    with_fast_linears,
    with_flash_attention,
    with_lora,
    with_mxfp4_experts,
)
from gptoss_opt.distributed import Region, local_part
from gptoss_opt.distributed import local as local_shards
from gptoss_opt.kernels.experts.impl.torch_grouped import TORCH_GROUPED
from gptoss_opt.model import attention as attention_module
from gptoss_opt.model import experts as experts_module
from gptoss_opt.parallel import dispatch, vocabulary
from gptoss_opt.verification.ranks import VerifyingRanks
from tests.distributed.models import UNEVEN
from tests.distributed.ranks import Ranks
from tests.distributed.test_foreign import lora
from tests.distributed.test_sharding import balanced, on_2d
from tests.helpers import WINDOW, ids, tiny_model

STACKS: dict[str, Callable[[Any], Any]] = {
    "replicas": shard_tensor_parallel(degree=2),
    "dense tensor": compose(shard_tensor_parallel(), with_flash_attention(), with_fast_experts()),
    "packed tensor": compose(
        shard_tensor_parallel(), with_mxfp4_experts(), with_flash_attention(), with_fast_linears()
    ),
    "packed experts": lambda model: with_mxfp4_experts(balanced()(model)),
    "both": compose(shard_tensor_parallel(), shard_experts(), with_mxfp4_experts(), with_flash_attention()),
    "two axes": on_2d,
    "adapters": compose(shard_tensor_parallel(), with_mxfp4_experts(), with_lora(rank=4), with_flash_attention()),
    "own tokens": compose(shard_experts(dispatch="all_to_all"), with_flash_attention()),
}


def dtypes() -> list[torch.dtype]:
    """Both; of four ranks, which share two cores here, only the one in which less is found."""
    return [torch.float32, torch.bfloat16][distributed.get_world_size() // 4 :]


def model_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A sharded model whose adapters, if it has some, change something."""
    # Of six experts four are chosen, so that a fault of any is where tokens go.
    model = STACKS[name](tiny_model(dtype, **UNEVEN, num_experts_per_tok=4))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.add_(0.1)
    return model


def told(found: Verification) -> str:
    """All that a verification says."""
    return f"{found}\n{found.to_dict()}"


def of_right(name: str) -> list[str]:
    for dtype in dtypes():
        model = model_of(name, dtype)
        before = [local_part(parameter).clone() for parameter in model.parameters()]
        found = verify(model, gradients=True)
        assert found.right, str(found)
        assert {drift.kind for drift in found.drifts} == {"forward", "gradient", "decoding"}
        assert {"embedding", "attention", "router", "experts", "norm", "head"} < {drift.part for drift in found.drifts}
        assert max(drift.share for drift in found.drifts) > 0.05
        # Nothing is left behind, and nothing was changed.
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        same = zip(before, model.parameters(), strict=True)
        assert all(torch.equal(one, local_part(other)) for one, other in same)
        assert not any(isinstance(value, Tensor) for module in model.modules() for value in vars(module).values())
    return [told(found), found.title]


@pytest.mark.parametrize("name", STACKS)
def test_what_is_right(ranks: Ranks, name: str) -> None:
    first, *others = ranks(of_right, name)
    assert all(other == first for other in others)
    assert f"on {ranks.num_ranks} ranks (cpu)" in first[1]


Fault = Callable[[pytest.MonkeyPatch, Any], None]


def is_last() -> bool:
    """Whether this is the rank that has a fault."""
    return distributed.get_rank() == distributed.get_world_size() - 1


def patched(owner: Any, name: str, change: Callable[..., Any]) -> Fault:
    """The last rank has another function: `change(real, ...)`."""

    def plant(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
        real = getattr(owner, name)
        if is_last():
            monkeypatch.setattr(owner, name, lambda *args, **options: change(real, *args, **options))

    return plant


def of_experts(change: Callable[..., Any]) -> Fault:
    """The last rank computes its experts with other indices or weights."""
    return patched(
        experts_module,
        "experts",
        lambda real, x, indices, weights, gate_up, down, **options: real(
            x, *change(indices, weights, gate_up, down), **options
        ),
    )


def drifted(name: str) -> Fault:
    """The last rank has other values of what all ranks should hold alike."""

    def plant(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
        if is_last():
            local_part(model.get_parameter(name)).mul_(1.05)

    return plant


def stale(weights: Any) -> Any:
    scales = weights.scales.clone()
    scales[0, 3, 0] += 1  # one block of 32 values
    return replace(weights, scales=scales)


def other_sinks(real: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, **options: Any) -> Any:
    """The first head of the rank has no sink."""
    sinks = sinks.clone()
    sinks[0] = -1e4
    return real(q, k, v, sinks=sinks, **options)


def own_part(real: Any, region: Region, x: Tensor) -> Tensor:
    """The sum is made, so that nobody waits, and not taken."""
    real(region, x)
    return x


def rows_turned(real: Any, x: Tensor, *args: Any) -> Tensor:
    """Rows of hidden states go back in another order than they came in."""
    return real(x.flip(0) if x.is_floating_point() and x.shape[-1] == 64 else x, *args)


FAULTS: dict[str, tuple[str, Fault, set[str]]] = {
    "a sink": ("dense tensor", patched(attention_module, "attention", other_sinks), {"attention"}),
    "a bias added twice": ("dense tensor", patched(local_shards, "add_once", lambda real, x, here: x), {"experts"}),
    "sums dropped": (
        "dense tensor",
        patched(Region, "reduce_from_region", own_part),
        {"embedding", "attention", "experts"},
    ),
    "logits in another order": (
        "dense tensor",
        patched(vocabulary, "all_gather_last", lambda real, *args: real(*args).flip(-1)),
        {"head"},
    ),
    "a stale scale": (
        "packed experts",
        of_experts(lambda i, w, gate_up, down: (i, w, gate_up, stale(down))),
        {"experts"},
    ),
    "experts in another order": (
        "both",
        of_experts(lambda i, w, gate_up, down: (i.flip(-1), w, gate_up, down)),
        {"experts"},
    ),
    "rows in another order": ("own tokens", patched(dispatch, "all_to_all", rows_turned), {"experts"}),
    "a router that drifted": ("packed tensor", drifted("model.layers.1.mlp.router.weight"), {"router"}),
    "a norm that drifted": ("own tokens", drifted("model.layers.0.input_layernorm.weight"), {"norm"}),
}
"""By name: the stack, the fault of the last rank, and the parts that must be found."""


def of_fault(name: str) -> tuple[list[str], bool, set[str]]:
    stack, plant, _ = FAULTS[name]
    found = []
    for dtype in dtypes():
        model = model_of(stack, dtype)
        with pytest.MonkeyPatch.context() as monkeypatch, torch.no_grad():
            plant(monkeypatch, model)
            found.append(verify(model))
    parts = [{drift.part for drift in one.wrong} for one in found]
    return [told(one) for one in found], any(one.right for one in found), set.intersection(*parts)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_one_rank_is_found_by_all(ranks: Ranks, name: str) -> None:
    first, *others = ranks(of_fault, name)
    said, right, parts = first
    assert all(other == first for other in others)
    assert not right, said
    assert FAULTS[name][2] <= parts, said


def of_gradients() -> tuple[bool, set[tuple[str, str]]]:
    """Gradients are not summed over the ranks."""
    model = model_of("dense tensor")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Region, "copy_to_region", lambda region, x: x)
        return verify(model).right, {(drift.part, drift.kind) for drift in verify(model, gradients=True).wrong}


def test_gradients_that_are_not_summed_are_found_if_asked_for(ranks: Ranks) -> None:
    for forward_is_right, wrong in ranks(of_gradients):
        assert forward_is_right
        assert wrong == {("attention", "gradient"), ("experts", "gradient")}


def of_backends() -> tuple[set[str], set[str]]:
    """One backend serves on all ranks but the last; then it does everywhere, and is wrong on the last."""
    model = compose(shard_tensor_parallel(), with_fast_experts(backend="reference"))(tiny_model(**UNEVEN))
    kind = type(TORCH_GROUPED)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if is_last():
            monkeypatch.setattr(kind, "why_not", lambda self, request: "not here")
        tried = {drift.backend for drift in verify(model).drifts if drift.part == "experts"}
    with pytest.MonkeyPatch.context() as monkeypatch:
        if is_last():
            real = kind.forward
            monkeypatch.setattr(kind, "forward", lambda self, *args: real(self, *args) * 1.01)
        found = verify(model)
    return tried, {drift.backend for drift in found.wrong}


def test_backends_that_serve_on_all_ranks_are_tried(ranks: Ranks) -> None:
    for tried, wrong in ranks(of_backends):
        assert "reference" in tried
        assert "torch" not in tried
        assert wrong == {"torch"}


def of_own_tokens() -> str:
    rank, model = distributed.get_rank(), model_of("own tokens")
    assert VerifyingRanks.of(model).dp_rank == rank  # by which random tokens are made
    found = verify(model, tokens=ids(1 + rank, 2 * WINDOW + rank, seed=rank))
    assert found.right, str(found)
    return told(found)


def test_ranks_with_tokens_of_their_own_give_their_own(ranks: Ranks) -> None:
    first, *others = ranks(of_own_tokens)
    assert all(other == first for other in others)
    assert "1 rows of 16 tokens or 2 rows of 17 tokens" in first


def fsdp(model: Any) -> Any:
    return fully_shard(model, mesh=init_distributed(device="cpu"))


def another_dtensor(model: Any) -> Any:
    head = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(distribute_tensor(head.data, init_distributed(device="cpu")))
    return model


REFUSALS: dict[str, tuple[Callable[[Any], Any], dict[str, Any], str]] = {
    "tokens": (shard_tensor_parallel, {"tokens": ids(seed=2)}, r"compute the same tokens together were given others"),
    "no tokens": (shard_tensor_parallel, {"tokens": torch.ones(2, 9)}, r"tokens are torch.float32 \[2, 9\]"),
    "against": (shard_experts, {"against": "a friend"}, r"against is 'a friend'. Use 'eager'"),
    "gradients": (shard_experts, {"gradients": True}, r"the ranks disagree on gradients: False on rank 0.*; True on"),
    "FSDP": (fsdp, {}, r"embed_tokens.weight is held by FSDP, .*before fully_shard"),
    "another DTensor": (another_dtensor, {}, r"lm_head.weight is held by something else than wrappers of gptoss_opt"),
}
"""By name: how the model is spread, what the last rank asks for, and what is said on all."""


def of_refusal(name: str) -> str:
    wrap, options, _ = REFUSALS[name]
    model = wrap(tiny_model(**UNEVEN))
    with pytest.raises(ValueError) as error:  # noqa: PT011
        verify(model, **{"tokens": ids(), **(options if is_last() else {})})
    return str(error.value)


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_on_every_rank(ranks: Ranks, name: str) -> None:
    for said in ranks(of_refusal, name):
        assert re.search(REFUSALS[name][2], said), said


def beside_adapters_of_peft(first: bool) -> bool:
    if first:
        model = lora(tiny_model(**UNEVEN), "q_proj", "o_proj")
        shard_experts(model.base_model.model)
    else:
        model = lora(shard_experts(tiny_model(**UNEVEN)), "q_proj", "o_proj")
    right = verify(model).right
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].register_forward_hook(lambda *x: 2 * x[2])
    return right and not verify(model).right


@pytest.mark.parametrize("first", [True, False], ids=["adapters first", "sharded first"])
def test_adapters_of_peft_beside_sharded_experts_are_part_of_the_weights(ranks: Ranks, first: bool) -> None:
    assert all(ranks(beside_adapters_of_peft, first))


def of_ddp() -> bool:
    return verify(DistributedDataParallel(with_flash_attention(tiny_model())), gradients=True).right


def test_under_ddp_each_rank_verifies_what_it_holds(ranks: Ranks) -> None:
    assert all(ranks(of_ddp))

"""The loss in chunks on 2 and 4 processes against one: over parts of the vocabulary, and without gathering logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from gptoss_opt import (
    compose,
    init_distributed,
    shard_experts,
    shard_tensor_parallel,
    stack_of,
    with_chunked_loss,
    with_flash_attention,
    with_lora,
)
from gptoss_opt.distributed import Region
from gptoss_opt.kernels import loss as kernel
from gptoss_opt.parallel import vocabulary
from tests.distributed.models import UNEVEN, whole
from tests.distributed.ranks import Ranks
from tests.distributed.test_sharded_model import Counted
from tests.distributed.test_sharding import WRAPS
from tests.helpers import ids, loss_and_gradients, relative, tiny_model

CHUNKED = with_chunked_loss(chunk_tokens=7)
SHARDED = ("tensor parallel", "expert parallel", "tensor, then expert parallel", "two axes", "packed, then tensor")

Found = dict[str, Any]
"""Loss, logits where they are returned, and gradients, which are gathered on the first rank."""


def small(**changes: Any) -> Any:
    return tiny_model(**{**UNEVEN, **changes}).train()


def labels() -> Tensor:
    """Labels of which many are ignored, so that chunks do not fall on rows."""
    found = ids().clone()
    found[:, ::4] = -100
    return found


def found_on(model: Any, **kwargs: Any) -> Found:
    out = model(ids(), labels=labels(), **kwargs)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "logits": out.logits, "gradients": whole(gradients, model)}


def alone(model: Any) -> Found:
    loss, gradients = loss_and_gradients(model, ids(), labels=labels())
    return {"loss": loss, "gradients": gradients}


def difference(found: list[Found], exact: Found) -> float:
    """The largest of the relative differences of the loss and all gradients."""
    assert all(torch.equal(one["loss"], found[0]["loss"]) for one in found), "ranks must never drift apart"
    gradients = found[0]["gradients"]
    assert {"lm_head.weight", "model.embed_tokens.weight"} & gradients.keys()
    assert all(name.endswith(("gate_up_proj", "down_proj")) for name in exact["gradients"].keys() - gradients.keys())
    of_gradients = [relative(gradient, exact["gradients"][name]) for name, gradient in gradients.items()]
    return max(relative(found[0]["loss"], exact["loss"]), *of_gradients)


def trained(name: str, first: bool, changes: dict[str, Any]) -> Found:
    model = small(**changes)
    model = WRAPS[name](CHUNKED(model)) if first else CHUNKED(WRAPS[name](model))
    assert len(stack_of(model)) > 1
    return found_on(model)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", SHARDED)
def test_as_in_one_process(ranks: Ranks, name: str, first: bool) -> None:
    found = ranks(trained, name, first, {})
    assert all(one["logits"] is None for one in found)
    assert difference(found, alone(small())) < 1e-5


def in_chunks_of_its_own() -> Found:
    """Ranks with parts of different sizes may find other numbers of rows good: they must agree on one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "rows_of_chunk", lambda *args, **kwargs: 3 + 2 * distributed.get_rank())
        return found_on(with_chunked_loss(shard_tensor_parallel(small())))


def test_ranks_agree_on_the_size_of_a_chunk(ranks: Ranks) -> None:
    assert difference(ranks(in_chunks_of_its_own), alone(small())) < 1e-5


def test_tied_embeddings(ranks: Ranks) -> None:
    changes = {"tie_word_embeddings": True}
    assert difference(ranks(trained, "tensor parallel", True, changes), alone(small(**changes))) < 1e-5


def without(what: str) -> Found:
    with pytest.MonkeyPatch.context() as patch:
        if what == "the sum of the gradient":
            patch.setattr(vocabulary, "logits_of_parts", lambda data, module, inner, input: inner(input))
        else:
            patch.setattr(Region, what, lambda self, x: x)
        found = found_on(CHUNKED(shard_tensor_parallel(small())))
    # What one rank finds is then its own affair.
    return {**found, "loss": torch.zeros(())} if what != "the sum of the gradient" else found


@pytest.mark.parametrize("what", ["max", "sum", "the sum of the gradient"])
def test_without_one_reduction_it_differs(ranks: Ranks, what: str) -> None:
    found, exact = ranks(without, what), alone(small())
    del exact["loss"]
    assert difference(found, {**exact, "loss": found[0]["loss"]}) > 1e-2


def counted() -> tuple[set[tuple[str, tuple[int, ...]]], int]:
    model = CHUNKED(shard_tensor_parallel(small()))
    with Counted() as seen:
        model(ids(), labels=labels())
    return set(seen.shapes), seen.calls["all_gather"]


def test_logits_are_not_gathered(ranks: Ranks) -> None:
    num_rows = int((labels()[:, 1:] != -100).sum())
    for shapes, gathered in ranks(counted):
        assert not gathered
        # A maximum and two sums for each token of a chunk; else what the layers send.
        assert {shape[-1] for _, shape in shapes} == {1, 2, 64}
        assert max(shape[0] for _, shape in shapes if shape[-1] < 64) <= 7 < num_rows


def returned(grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    model = CHUNKED(shard_tensor_parallel(small().eval()))
    with torch.set_grad_enabled(grad):
        out = model(ids(), labels=labels())
        return out.loss.detach(), out.logits.detach(), model(ids()).logits.detach()


@pytest.mark.parametrize("grad", [True, False])
def test_logits_are_whole_where_they_are_returned(ranks: Ranks, grad: bool) -> None:
    exact = small()(ids(), labels=labels())
    for loss, logits, plain in ranks(returned, grad):
        assert torch.equal(logits, plain)
        assert relative(logits, exact.logits) < 1e-5
        torch.testing.assert_close(loss, exact.loss.detach(), rtol=1e-6, atol=0)


def with_a_loss_of_ones_own(model: Any) -> dict[str, Tensor]:
    out = model(ids(), labels=labels(), return_logits=True)
    (out.loss + out.logits.square().mean()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def gathered(compute: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
    model = CHUNKED(shard_tensor_parallel(small()))
    return whole(compute(model), model)


def test_logits_that_are_returned_pass_gradients_on(ranks: Ranks) -> None:
    found = ranks(gathered, with_a_loss_of_ones_own)[0]
    for name, gradient in with_a_loss_of_ones_own(small()).items():
        assert relative(found[name], gradient) < 1e-5, name


def replicated(which: str) -> dict[str, Tensor]:
    """The gradients where each replica has tokens of its own."""
    model, rank, world = CHUNKED(small()), distributed.get_rank(), distributed.get_world_size()
    if which == "all to all":
        model, replica, replicas = shard_experts(model, dispatch="all_to_all"), rank, world
    else:
        mesh = init_distributed((2, world // 2), ("dp", "tp"), device="cpu")
        model, replica, replicas = shard_tensor_parallel(model, mesh=mesh["tp"]), rank // (world // 2), 2
    mine = ids(4, 12)[replica::replicas]
    model(mine, labels=mine).loss.backward()
    return whole({name: p.grad for name, p in model.named_parameters()}, model)


@pytest.mark.parametrize("which", ["dp x tp", "all to all"])
def test_replicas_average_their_gradients(ranks: Ranks, which: str) -> None:
    _, exact = loss_and_gradients(small(), ids(4, 12))
    found = ranks(replicated, which)[0]
    for name, gradient in exact.items():
        assert relative(found[name], gradient) < 1e-5, name


def nothing_counts() -> tuple[bool, float]:
    model = CHUNKED(shard_tensor_parallel(small()))
    out = model(ids(), labels=torch.full_like(ids(), -100))
    out.loss.backward()
    return bool(out.loss.isnan()), max(float(p.grad.to_local().abs().max()) for p in model.parameters())


def test_a_batch_in_which_no_label_counts(ranks: Ranks) -> None:
    assert ranks(nothing_counts) == [(True, 0.0)] * ranks.num_ranks


def outside() -> str:
    model = CHUNKED(shard_tensor_parallel(small()))
    with pytest.raises(IndexError) as error:
        model(ids(), labels=ids().index_fill(1, torch.tensor([3]), 131))
    return str(error.value)


def test_a_label_outside_the_vocabulary_is_said_on_every_rank(ranks: Ranks) -> None:
    assert set(ranks(outside)) == {"label 131 is outside the vocabulary of 131, and is not ignored."}


def adapted() -> Any:
    model = compose(with_lora(rank=4, targets=("q_proj", "lm_head")), with_flash_attention())(small())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view(parameter.shape))
    return model


def adapted_on_rank() -> Found:
    return found_on(shard_tensor_parallel(CHUNKED(adapted())))


def test_adapters_of_the_head(ranks: Ranks) -> None:
    exact, found = alone(adapted()), ranks(adapted_on_rank)
    assert {"lm_head.lora_A", "lm_head.lora_B"} < found[0]["gradients"].keys() == exact["gradients"].keys()
    torch.testing.assert_close(found[0]["loss"], exact["loss"], rtol=1e-5, atol=0)
    for name, gradient in exact["gradients"].items():
        assert relative(found[0]["gradients"][name], gradient) < 1e-5, name

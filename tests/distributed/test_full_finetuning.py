"""Full finetuning on 2 and 4 processes: sharded, in DDP, in FSDP2 and by accelerate, as one process does."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gptoss_opt import (
    explain,
    shard_experts,
    shard_tensor_parallel,
    stack_of,
    undo,
    with_flash_attention,
    with_full_finetuning,
)
from gptoss_opt.distributed import Region
from tests.distributed.models import UNEVEN, whole
from tests.distributed.ranks import Ranks
from tests.distributed.test_sharding import on_2d
from tests.helpers import ids, relative, tiny_model

SHARDS: dict[str, Callable[[Any], Any]] = {
    "tensor parallel": shard_tensor_parallel,
    "expert parallel": shard_experts,
    "both": lambda model: shard_experts(shard_tensor_parallel(model)),
    "two axes": on_2d,
    "own tokens": lambda model: shard_experts(model, dispatch="all_to_all"),
}
BATCH = 4


def uneven() -> Any:
    """In float64, in which transformers computes experts one by one."""
    model = tiny_model(torch.float64, **UNEVEN)
    model.set_experts_implementation("eager")
    return model


def padded() -> Tensor:
    """A mask with some padding on the left of each row, as many in each half and quarter of the batch."""
    mask = torch.ones(BATCH, 21, dtype=torch.long)
    mask[:, :3] = 0
    return mask


def mine(batch: Tensor, own_tokens: bool) -> Tensor:
    """The rows of a batch that are this rank's, if each has its own."""
    return batch.chunk(distributed.get_world_size())[distributed.get_rank()] if own_tokens else batch


def loss_of(model: Any, own_tokens: bool = False) -> Tensor:
    rows, mask = mine(ids(BATCH), own_tokens), mine(padded(), own_tokens)
    return model(rows, labels=rows.masked_fill(mask == 0, -100), attention_mask=mask).loss


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# Sharded


def sharded(name: str, options: dict[str, Any], first: str) -> tuple[float, dict[str, Tensor]]:
    """The loss and all gradients of a model that was wrapped before or after it was sharded."""
    model = uneven().requires_grad_(False)
    wraps = [SHARDS[name], lambda model: with_full_finetuning(model, **options)]
    for wrap in wraps if first == "sharded" else wraps[::-1]:
        wrap(model)
    loss = loss_of(model.train(), name == "own tokens")
    loss.backward()
    return loss.item(), whole(gradients(model), model)


def expected(name: str, router_aux_loss: float | None, num_ranks: int) -> tuple[float, dict[str, Tensor]]:
    """What one process has for it; where ranks have their own tokens, the mean of their losses."""
    model = uneven().train()
    if router_aux_loss is not None:
        model.config.output_router_logits, model.router_aux_loss_coef = True, router_aux_loss
    parts = num_ranks if name == "own tokens" else 1
    losses = []
    for rows, mask in zip(ids(BATCH).chunk(parts), padded().chunk(parts), strict=True):
        loss = model(rows, labels=rows.masked_fill(mask == 0, -100), attention_mask=mask).loss / parts
        loss.backward()
        losses.append(loss.item())
    return sum(losses), gradients(model)


@pytest.mark.parametrize("router_aux_loss", [None, 0.5])
@pytest.mark.parametrize("first", ["sharded", "trained"])
@pytest.mark.parametrize("name", SHARDS)
def test_sharded_gradients_are_those_of_one_process(
    ranks: Ranks, name: str, first: str, router_aux_loss: float | None
) -> None:
    loss, wanted = expected(name, router_aux_loss, ranks.num_ranks)
    found = ranks(sharded, name, {"router_aux_loss": router_aux_loss}, first)
    assert sum(one[0] for one in found) / len(found) == pytest.approx(loss, rel=1e-9)
    got = found[0][1]
    assert got.keys() == wanted.keys() == dict(uneven().named_parameters()).keys()
    assert max(relative(got[key], wanted[key]) for key in wanted) < 1e-9
    # Negative control: with another weight of the router's loss the gradients are others.
    if router_aux_loss and first == "sharded":
        _, other = ranks(sharded, name, {"router_aux_loss": 0.25}, first)[0]
        assert min(relative(other[key], wanted[key]) for key in wanted if "router" in key) > 1e-3


def recomputed(name: str, broken: bool) -> list[float]:
    """How far the gradients with checkpoints are from those without, by parameter."""
    into, found = Region.copy_to_region, []
    for checkpointing in (True, False):
        model = with_full_finetuning(SHARDS[name](uneven()), gradient_checkpointing=checkpointing).train()
        loss = loss_of(model, name == "own tokens")
        if broken:
            Region.copy_to_region = lambda self, x: into(self, 1.001 * x)
        try:
            loss.backward()
        finally:
            Region.copy_to_region = into
        found.append({key: gradient.to_local() for key, gradient in gradients(model).items()})
    return [relative(found[0][key], found[1][key]) for key in found[1]]


@pytest.mark.parametrize("name", SHARDS)
def test_layers_computed_again_meet_the_other_ranks_again(ranks: Ranks, name: str) -> None:
    for differences in ranks(recomputed, name, False):
        assert max(differences) < 1e-12


def test_a_layer_that_is_computed_otherwise_the_second_time_is_noticed(ranks: Ranks) -> None:
    assert max(max(differences) for differences in ranks(recomputed, "tensor parallel", True)) > 1e-5


def every_order() -> None:
    """The same stack and the same bits in whatever order the wrappers come."""
    first = None
    for order in itertools.permutations([with_full_finetuning, shard_tensor_parallel, shard_experts]):
        model = tiny_model(**UNEVEN).requires_grad_(False)
        for wrap in order:
            model = wrap(model)
        loss_of(model.train()).backward()
        found = stack_of(model), [gradient.to_local() for gradient in gradients(model).values()]
        first = first or found
        assert found[0] == first[0]
        assert len(found[1]) == len(list(model.parameters()))
        assert all(torch.equal(one, two) for one, two in zip(found[1], first[1], strict=True))


def test_every_order_gives_the_same_gradients(ranks: Ranks) -> None:
    ranks(every_order)


def flags_come_back() -> None:
    model = uneven()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 == 0)
    before = [parameter.requires_grad for parameter in model.parameters()]
    for wrap in (with_full_finetuning, shard_experts):
        wrap(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    shard_tensor_parallel(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    undo(model, with_full_finetuning)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert len(stack_of(model)) == 2


def test_undo_gives_the_flags_of_a_sharded_model_back(ranks: Ranks) -> None:
    ranks(flags_come_back)


def explained() -> tuple[str, int]:
    model = shard_tensor_parallel(with_full_finetuning(tiny_model(**UNEVEN)))
    row = next(row for row in explain(model).rows if row.wrapper == "with_full_finetuning()")
    return " ".join(row.changed), sum(parameter.to_local().nbytes for parameter in model.parameters())


def test_explain_counts_this_ranks_part(ranks: Ranks) -> None:
    total = sum(parameter.nbytes for parameter in tiny_model(**UNEVEN).parameters())
    for text, held in ranks(explained):
        assert held < 0.7 * total
        named = re.search(
            r"gradients ([\d.]+) MB, optimizer state ([\d.]+) MB .*: ([\d.]+) MB with the weights, on", text
        )
        assert named, text
        for number, factor in zip(named.groups(), (1, 2, 4), strict=True):
            assert float(number) == pytest.approx(factor * held / 1e6, abs=0.006)


# Data parallel


@contextmanager
def accelerated() -> Iterator[accelerate.Accelerator]:
    """An accelerator as torchrun would have it make one."""
    rank, num_ranks = str(distributed.get_rank()), str(distributed.get_world_size())
    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    os.environ.update(torchrun)
    try:
        yield accelerate.Accelerator(cpu=True)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        for name in torchrun:
            del os.environ[name]


def steps(model: Any, optimizer: Any, own_tokens: bool, backward: Callable[[Tensor], None] = Tensor.backward) -> Any:
    """The losses of five steps, averaged over the ranks, and the norms of the gradients before clipping."""
    losses, norms = [], []
    for step in range(5):
        rows = mine(ids(BATCH, seed=step % 2), own_tokens)
        loss = model(rows, labels=rows).loss
        backward(loss)
        norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if own_tokens:
            distributed.all_reduce(total)
            total /= distributed.get_world_size()
        losses.append(total.item())
    return losses, norms


def curve(how: str) -> Any:
    """What each rank learns with its part of the batch."""
    model = uneven().requires_grad_(False)
    with_flash_attention(with_full_finetuning(model, router_aux_loss=0.5 if "router" in how else None)).train()
    if how.startswith("fsdp"):
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        assert type(model.model.layers[0]).__name__.startswith("FSDP")
    if how.startswith("accelerate"):
        with accelerated() as accelerator:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            prepared, optimizer = accelerator.prepare(model, optimizer)
            assert isinstance(prepared, DistributedDataParallel)
            return steps(prepared, optimizer, True, accelerator.backward)
    if how.startswith("ddp"):
        return steps(DistributedDataParallel(model), torch.optim.AdamW(model.parameters(), lr=1e-3), True)
    if how in SHARDS:
        SHARDS[how](model)
    return steps(model, torch.optim.AdamW(model.parameters(), lr=1e-3), how.startswith(("fsdp", "own")))


def curve_alone(parts: int = 1, router_aux_loss: float | None = None) -> Any:
    """What one process learns with the whole batch, in as many parts."""
    model = uneven().train()
    if router_aux_loss is not None:
        model.config.output_router_logits, model.router_aux_loss_coef = True, router_aux_loss
    optimizer, losses, norms = torch.optim.AdamW(model.parameters(), lr=1e-3), [], []
    for step in range(5):
        total = 0.0
        for rows in ids(BATCH, seed=step % 2).chunk(parts):
            loss = model(rows, labels=rows).loss / parts
            loss.backward()
            total += loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms


@pytest.mark.parametrize("how", ["ddp", "accelerate", "fsdp", *SHARDS])
def test_five_steps_are_those_of_one_process(ranks: Ranks, how: str) -> None:
    expected_losses, expected_norms = curve_alone()
    for losses, norms in ranks(curve, how):
        torch.testing.assert_close(losses, expected_losses, rtol=1e-6, atol=0)
        torch.testing.assert_close(norms, expected_norms, rtol=1e-6, atol=0)
    assert expected_losses[-1] < expected_losses[0]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_the_routers_loss_in_data_parallel_is_the_mean_of_the_ranks(ranks: Ranks, how: str) -> None:
    expected_losses, expected_norms = curve_alone(ranks.num_ranks, 0.5)
    for losses, norms in ranks(curve, f"{how} with the router's loss"):
        torch.testing.assert_close(losses, expected_losses, rtol=1e-6, atol=0)
        torch.testing.assert_close(norms, expected_norms, rtol=1e-6, atol=0)
    # Negative control: without the router's loss the curve is another.
    assert abs(curve_alone(ranks.num_ranks)[0][0] / expected_losses[0] - 1) > 1e-2

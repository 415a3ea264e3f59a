"""torch.distributed.checkpoint of sharded models is exact: uneven parts, placed experts, any number of ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gptoss_opt import balance_experts, compose, shard_experts, shard_tensor_parallel, undo, with_mxfp4_experts
from tests.distributed.models import UNEVEN
from tests.distributed.ranks import Ranks
from tests.helpers import ids, relative, tiny_model

# Said where one process saves and loads alone, which is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

LOAD = [[9, 1, 1, 1, 1, 5], [1, 2, 3, 4, 5, 6]]
WRAP: dict[str, Callable[[int], Callable[[Any], Any]]] = {
    "tensor parallel": lambda degree: shard_tensor_parallel(degree=degree),
    "placed experts": lambda degree: shard_experts(degree=degree, placement=balance_experts(LOAD, degree)),
    "both": lambda degree: compose(
        shard_tensor_parallel(degree=degree), shard_experts(degree=degree, placement=balance_experts(LOAD, degree))
    ),
    "packed": lambda degree: compose(shard_tensor_parallel(degree=degree), with_mxfp4_experts()),
}


def zeroed(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).zero_()
    return model


def saved(way: str, folder: Path, degree: int) -> None:
    model = WRAP[way](degree)(tiny_model(**UNEVEN))
    checkpoint.save(model.state_dict(), checkpoint_id=folder, no_dist=False)


def loaded(way: str, folder: Path, degree: int) -> float:
    model = zeroed(WRAP[way](degree)(tiny_model(**UNEVEN)))
    assert relative(model(ids()).logits, tiny_model(**UNEVEN)(ids()).logits) > 0.1
    state = model.state_dict()
    checkpoint.load(state, checkpoint_id=folder)
    model.load_state_dict(state)
    return relative(model(ids()).logits, tiny_model(**UNEVEN)(ids()).logits)


@pytest.mark.parametrize("way", WRAP)
def test_round_trips(ranks: Ranks, way: str, tmp_path: Path) -> None:
    num_ranks = ranks.num_ranks
    ranks(saved, way, tmp_path, num_ranks)
    assert max(ranks(loaded, way, tmp_path, num_ranks)) < 1e-5
    # Into another number of ranks, and into a model that is not sharded.
    assert max(ranks(loaded, way, tmp_path, 2 if num_ranks == 4 else 1)) < 1e-5
    model = zeroed(tiny_model(**UNEVEN))
    if way == "packed":
        model = with_mxfp4_experts(model)
        zeroed(model)
    state = model.state_dict()
    checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    model.load_state_dict(state)
    exact = tiny_model(**UNEVEN).state_dict()
    for name, tensor in undo(model).state_dict().items():
        assert torch.equal(tensor, exact[name]), name


def read_plain(way: str, folder: Path) -> float:
    return loaded(way, folder, distributed.get_world_size())


@pytest.mark.parametrize("way", ["tensor parallel", "both"])
def test_what_one_process_saved_is_read_by_many(ranks: Ranks, way: str, tmp_path: Path) -> None:
    checkpoint.save(tiny_model(**UNEVEN).state_dict(), checkpoint_id=tmp_path, no_dist=True)
    assert max(ranks(read_plain, way, tmp_path)) < 1e-5


def optimizer_of(kind: str, model: Any) -> torch.optim.Optimizer:
    if kind == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr=0.01)
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def trained(way: str, kind: str, folder: Path) -> float:
    """An optimizer's state comes back too: two steps, and one step, saved, loaded into another, and one more."""
    degree = distributed.get_world_size()

    def made() -> tuple[Any, Any]:
        model = WRAP[way](degree)(tiny_model(**UNEVEN))
        return model, optimizer_of(kind, model)

    def step(model: Any, optimizer: Any) -> Tensor:
        optimizer.zero_grad()
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    model, optimizer = made()
    step(model, optimizer)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    checkpoint.save(state, checkpoint_id=folder)
    step(model, optimizer)
    wanted = step(model, optimizer)

    model, optimizer = made()
    zeroed(model)
    step(model, optimizer)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    by_name = dict(model.named_parameters())
    for name, values in state["optimizer"]["state"].items():
        for key, value in values.items():
            held = optimizer.state[by_name[name]][key]
            (held.to_local() if isinstance(held, DTensor) else held).copy_(
                value.to_local() if isinstance(value, DTensor) else value
            )
    step(model, optimizer)
    return relative(step(model, optimizer), wanted)


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
@pytest.mark.parametrize("way", ["tensor parallel", "placed experts"])
def test_an_optimizer_goes_on(ranks: Ranks, way: str, kind: str, tmp_path: Path) -> None:
    assert max(ranks(trained, way, kind, tmp_path)) < 1e-4


def gradients_of(way: str) -> float:
    model, plain = WRAP[way](distributed.get_world_size())(tiny_model(**UNEVEN)), tiny_model(**UNEVEN)
    for one in (model, plain):
        one(ids(), labels=ids()).loss.backward()
    wanted = dict(plain.named_parameters())
    pairs = [(p.grad, wanted[name].grad) for name, p in model.named_parameters()]
    return max(relative((gradient * 2).full_tensor(), 2 * exact) for gradient, exact in pairs)


@pytest.mark.parametrize("way", ["tensor parallel", "placed experts", "both"])
def test_full_gradients(ranks: Ranks, way: str) -> None:
    assert max(ranks(gradients_of, way)) < 1e-4


def saved_by_each(way: str, folder: Path) -> float:
    model = WRAP[way](distributed.get_world_size())(tiny_model(**UNEVEN))
    file = folder / f"{distributed.get_rank()}.pt"
    torch.save(model.state_dict(), file)
    zeroed(model)
    state = torch.load(file, weights_only=True)
    model.load_state_dict(state)
    whole = max(relative(p.full_tensor(), state[name].full_tensor()) for name, p in model.named_parameters())
    return whole + relative(model(ids()).logits, tiny_model(**UNEVEN)(ids()).logits)


@pytest.mark.parametrize("way", ["tensor parallel", "both"])
def test_what_each_rank_saves_by_itself(ranks: Ranks, way: str, tmp_path: Path) -> None:
    assert max(ranks(saved_by_each, way, tmp_path)) < 1e-5


def averaged() -> str:
    model = compose(shard_tensor_parallel(), with_mxfp4_experts())(tiny_model(**UNEVEN))
    model.requires_grad_(False).requires_grad_(True)
    assert all(p.requires_grad == p.is_floating_point() for p in model.parameters())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    with pytest.raises(ValueError, match="was called on packed weights") as error:
        average.update_parameters(model)
    return str(error.value)


def test_codes_are_not_averaged_either(ranks: Ranks) -> None:
    assert all("no numbers" in said for said in ranks(averaged))


def wholes(way: str) -> float:
    model = WRAP[way](distributed.get_world_size())(tiny_model(**UNEVEN))
    exact = tiny_model(**UNEVEN).state_dict()
    copied = copy.deepcopy(model)
    parameters = [*model.named_parameters(), *copied.named_parameters()]
    pairs = [(name, tensor) for name, p in parameters for tensor in (p, torch.zeros_like(p) + p)]
    return max(relative(tensor.full_tensor(), exact[name]) for name, tensor in pairs)


@pytest.mark.parametrize("way", ["tensor parallel", "placed experts", "both"])
def test_full_tensors(ranks: Ranks, way: str) -> None:
    assert max(ranks(wholes, way)) == 0

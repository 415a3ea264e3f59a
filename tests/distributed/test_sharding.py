"""Sharded models on 2 and 4 processes against one process: logits, loss, gradients, tokens, in any order."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from gptoss_opt import (
    balance_experts,
    compose,
    gather_state_dict,
    init_distributed,
    load,
    shard_experts,
    shard_tensor_parallel,
    stack_of,
    undo,
    with_fast_experts,
    with_flash_attention,
    with_mxfp4_experts,
)
from gptoss_opt.distributed import Region, add_once
from gptoss_opt.distributed import local as local_shards
from gptoss_opt.parallel import dispatch
from tests.distributed.models import UNEVEN, expected, measured, on_rank, whole
from tests.distributed.ranks import Ranks
from tests.helpers import GOLDEN, ids, relative, tiny_model

LOAD = [[9, 1, 1, 1, 5, 3], [1, 2, 3, 4, 5, 6]]


def mesh_2d(axes: tuple[str, str] = ("ep", "tp")) -> Any:
    return init_distributed((distributed.get_world_size() // 2, 2), axes, device="cpu")


def balanced() -> Any:
    return shard_experts(placement=balance_experts(LOAD, distributed.get_world_size()))


def on_2d(model: Any) -> Any:
    mesh = mesh_2d()
    return shard_tensor_parallel(shard_experts(model, mesh=mesh["ep"]), mesh=mesh["tp"])


def as_data(model: Any) -> Any:
    mesh = {"ep": distributed.get_world_size() // 2, "tp": 2}
    return compose(shard_tensor_parallel(mesh=mesh), shard_experts(mesh=mesh))(model)


WRAPS: dict[str, Callable[[Any], Any]] = {
    "tensor parallel": shard_tensor_parallel,
    "attention only": lambda model: shard_tensor_parallel(model, experts=False, lm_head=False),
    "expert parallel": shard_experts,
    "placed experts": lambda model: balanced()(model),
    "tensor, then expert parallel": lambda model: shard_experts(shard_tensor_parallel(model)),
    "expert, then tensor parallel": lambda model: shard_tensor_parallel(shard_experts(model)),
    "placed experts beside tensor parallel": lambda model: compose(shard_tensor_parallel(), balanced())(model),
    "two axes": on_2d,
    "two axes as data": as_data,
    "flash, fast, tensor": lambda model: shard_tensor_parallel(with_fast_experts(with_flash_attention(model))),
    "expert, fast, flash": lambda model: with_flash_attention(with_fast_experts(shard_experts(model))),
    "packed, then tensor": lambda model: shard_tensor_parallel(with_mxfp4_experts(model)),
    "tensor, then packed": lambda model: with_mxfp4_experts(shard_tensor_parallel(model)),
    "placed, then packed": lambda model: with_mxfp4_experts(balanced()(model)),
    "packed on two axes": lambda model: with_flash_attention(on_2d(with_mxfp4_experts(model))),
}


def wrapped(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    return on_rank(WRAPS[name], **changes)


def compare(found: list[dict[str, Any]], exact: dict[str, Any], packed: bool = False) -> None:
    for one in found:
        assert relative(one["logits"], exact["logits"]) < 1e-5
        torch.testing.assert_close(one["loss"], exact["loss"], rtol=1e-5, atol=0)
        assert torch.equal(one["tokens"], exact["tokens"])
        # All ranks go on with the same bits, so that they never drift apart.
        assert torch.equal(one["logits"], found[0]["logits"])
    gradients = found[0]["gradients"]
    frozen = {name for name in exact["gradients"] if packed and name.endswith(("gate_up_proj", "down_proj"))}
    assert gradients.keys() == exact["gradients"].keys() - frozen
    for name, gradient in gradients.items():
        assert relative(gradient, exact["gradients"][name]) < 1e-4, name


@pytest.fixture(scope="module")
def exact() -> dict[str, Any]:
    return expected()


@pytest.mark.parametrize("name", WRAPS)
def test_as_in_one_process(ranks: Ranks, exact: dict[str, Any], name: str) -> None:
    compare(ranks(wrapped, name, {}), exact, packed="packed" in name)


def test_tied_embeddings(ranks: Ranks) -> None:
    changes = {"tie_word_embeddings": True}
    compare(ranks(wrapped, "tensor parallel", changes), expected(**changes))


@pytest.mark.parametrize("bias", [False, True])
def test_without_attention_bias(ranks: Ranks, bias: bool) -> None:
    changes = {"attention_bias": bias, "pad_token_id": 5}
    compare(ranks(wrapped, "tensor parallel", changes), expected(**changes))


def on_the_oracle(name: str, packed: bool, loading: bool) -> dict[str, Any]:
    """`measured` of the golden checkpoint, wrapped while it is loaded or afterwards; gradients gathered."""
    mesh = mesh_2d()
    stacks = {
        "tensor": compose(shard_tensor_parallel(mesh=mesh["tp"])),
        "experts": compose(shard_experts()),
        "two axes": compose(shard_tensor_parallel(mesh=mesh["tp"]), shard_experts(mesh=mesh["ep"])),
    }
    stack = compose(stacks[name], with_flash_attention(), with_mxfp4_experts() if packed else with_fast_experts())
    if loading:
        model = load(GOLDEN, stack, dtype=torch.float32)
    else:
        model = stack(AutoModelForCausalLM.from_pretrained(GOLDEN, dtype=torch.float32).float().eval())
    exact = load_file(GOLDEN / "expected.safetensors")
    found = measured(model, exact["input_ids"][None])
    tokens = model.generate(exact["input_ids"][None], max_new_tokens=len(exact["greedy"]), do_sample=False)
    return {**found, "gradients": whole(found["gradients"], model), "tokens": tokens}


@pytest.mark.parametrize("loading", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["tensor", "experts", "two axes"])
def test_on_the_oracle(ranks: Ranks, name: str, packed: bool, loading: bool) -> None:
    exact = load_file(GOLDEN / "expected.safetensors")
    found = ranks(on_the_oracle, name, packed, loading)
    for one in found:
        assert relative(one["logits"][0], exact["logits"]) < 1e-5
        torch.testing.assert_close(one["loss"].double(), exact["loss"][0], rtol=1e-5, atol=0)
        assert one["tokens"][0, len(exact["input_ids"]) :].tolist() == exact["greedy"].tolist()
    gradients = found[0]["gradients"]
    names = {name.removeprefix("grad.") for name in exact if name.startswith("grad.")}
    assert any("router" in name for name in names)
    compared = names & gradients.keys()
    assert names - compared <= {name for name in names if packed and name.endswith(("gate_up_proj", "down_proj"))}
    for name in compared:
        assert relative(gradients[name], exact[f"grad.{name}"]) < 1e-4, name


def every_order() -> int:
    """The same stack and the same bits whatever the order, before and after packing; returns how many orders."""
    wrappers = [with_mxfp4_experts, with_flash_attention, shard_tensor_parallel, shard_experts]
    first = None
    orders = list(itertools.permutations(wrappers))
    for order in orders:
        model = tiny_model(**UNEVEN)
        for wrap in order:
            model = wrap(model)
        found = stack_of(model), [p.to_local() for p in model.parameters()], model(ids()).logits
        first = first or found
        assert found[0] == first[0]
        assert all(torch.equal(one, two) for one, two in zip(found[1], first[1], strict=True))
        assert torch.equal(found[2], first[2]), order
    return len(orders)


def test_every_order_gives_the_same_bits(ranks: Ranks) -> None:
    assert ranks(every_order) == [24] * ranks.num_ranks


# What is left out, and which of the things compared must show it.
LEFT_OUT = {
    "an all-reduce": "logits",
    "the gradient into a product": "gradients",
    "the router's gradient": "gradients",
    "a bias once": "logits",
    "whose expert it is": "logits",
}


def broken(what: str, wrap: str) -> dict[str, Any]:
    into, out, once, places = Region.copy_to_region, Region.reduce_from_region, add_once, dispatch.PartOfExperts.places
    try:
        if what == "an all-reduce":
            Region.reduce_from_region = lambda self, x: x
        elif what == "the gradient into a product":
            Region.copy_to_region = lambda self, x: x
        elif what == "the router's gradient":
            Region.copy_to_region = lambda self, x: x if x.shape[-1] == 2 else into(self, x)
        elif what == "a bias once":
            local_shards.add_once = lambda x, here: x
        elif what == "whose expert it is":
            dispatch.PartOfExperts.places = lambda self, indices: (indices * 0 + self.region.rank, indices * 0)
        return on_rank(WRAPS[wrap])
    finally:
        Region.copy_to_region, Region.reduce_from_region, local_shards.add_once = into, out, once
        dispatch.PartOfExperts.places = places


@pytest.mark.parametrize(("what", "shown"), LEFT_OUT.items())
def test_what_is_left_out_is_noticed(ranks: Ranks, exact: dict[str, Any], what: str, shown: str) -> None:
    wrap = "expert parallel" if what == "whose expert it is" else "tensor parallel"
    found = ranks(broken, what, wrap)
    with pytest.raises(AssertionError):
        compare(found, exact)
    if shown == "logits":
        assert relative(found[-1]["logits"], exact["logits"]) > 1e-3
    else:
        assert relative(found[0]["logits"], exact["logits"]) < 1e-5
        worst = max(relative(g, exact["gradients"][name]) for name, g in found[0]["gradients"].items())
        assert worst > 1e-2


def sampled() -> Tensor:
    model = shard_tensor_parallel(tiny_model(**UNEVEN))
    torch.manual_seed(100 + distributed.get_rank())
    return model.generate(ids(2, 5), max_new_tokens=20, do_sample=True, temperature=2.0)


def test_sampling_draws_the_same_tokens_on_every_rank(ranks: Ranks) -> None:
    found = ranks(sampled)
    assert all(torch.equal(one, found[0]) for one in found)
    # Those of a single process with the first rank's seed.
    model, options = tiny_model(**UNEVEN), {"max_new_tokens": 20, "do_sample": True, "temperature": 2.0}
    alone = []
    for seed in (100, 101):
        torch.manual_seed(seed)
        alone.append(model.generate(ids(2, 5), **options))
    assert torch.equal(found[0], alone[0])
    assert not torch.equal(*alone)


def trained(name: str, steps: int) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms before clipping, and the parameters after some steps."""
    model = WRAPS[name](tiny_model(**UNEVEN)).train()
    losses, norms = train(model, steps)
    held = {name: p.detach() for name, p in model.named_parameters()}
    return losses, norms, whole(held, model)


def train(model: nn.Module, steps: int) -> tuple[list[float], list[float]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, norms = [], []
    for step in range(steps):
        loss = model(ids(seed=step), labels=ids(seed=step)).loss
        loss.backward()
        norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


@pytest.mark.parametrize("name", ["tensor parallel", "placed experts", "two axes"])
def test_training_with_clipping(ranks: Ranks, name: str) -> None:
    model = tiny_model(**UNEVEN).train()
    losses, norms = train(model, 5)
    assert all(norm > 1 for norm in norms), "nothing is clipped"
    found = ranks(trained, name, 5)
    for ours in found:
        torch.testing.assert_close(ours[0], losses, rtol=1e-4, atol=0)
        # Every rank has the true norm of all gradients.
        torch.testing.assert_close(ours[1], norms, rtol=1e-4, atol=0)
    # Adam divides by the square root of tiny second moments, so that single values may move by the learning rate.
    for key, parameter in model.named_parameters():
        assert relative(found[0][2][key], parameter) < 1e-3, key


def under_fsdp(axes: tuple[str, str]) -> dict[str, Any]:
    """Three steps of a model sharded over one axis and by FSDP2 over the other; each replica has half of the batch."""
    mesh = mesh_2d(axes)
    dp, inner = (mesh[axis] for axis in axes)
    wrap = shard_tensor_parallel if axes[1] == "tp" else shard_experts
    model = wrap(tiny_model(**UNEVEN), mesh=inner)
    for layer in model.model.layers:
        fully_shard(layer, mesh=dp)
    fully_shard(model, mesh=dp)
    parts, mine = dp.size(), dp.get_local_rank()
    batch = ids(batch=4)[mine * (4 // parts) :][: 4 // parts]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, norms = [], []
    for _ in range(3):
        loss = model(batch, labels=batch).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).full_tensor().item())
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / distributed.get_world_size()
        distributed.all_reduce(mean)
        losses.append(mean.item())
    return {"losses": losses, "norms": norms, "state": dict(gather_state_dict(model))}


@pytest.mark.parametrize("axes", [("dp", "tp"), ("dp", "ep")])
def test_composes_with_fsdp2_over_the_data_axis(ranks: Ranks, axes: tuple[str, str]) -> None:
    model, batch = tiny_model(**UNEVEN), ids(batch=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, norms = [], []
    for _ in range(3):
        loss = model(batch, labels=batch).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    every = ranks(under_fsdp, axes)
    for found in every:
        torch.testing.assert_close(found["losses"], losses, rtol=1e-4, atol=0)
        torch.testing.assert_close(found["norms"], norms, rtol=1e-4, atol=0)
    first, *others = (found["state"] for found in every)
    assert list(first) == list(model.state_dict())
    assert all(relative(first[key], value) < 1e-4 for key, value in model.state_dict().items())
    assert all(value is None for other in others for value in other.values())


def unpacked_replicas(name: str) -> dict[str, Any]:
    """Packed first, then sharded among replicas, then unpacked: gradients of half a batch each, gathered."""
    model = with_mxfp4_experts(tiny_model(**UNEVEN))
    if name == "all to all":
        shard_experts(model, dispatch="all_to_all")
        mine, parts = distributed.get_rank(), distributed.get_world_size()
    else:
        shard_tensor_parallel(model, degree=2)
        mine, parts = distributed.get_rank() // 2, distributed.get_world_size() // 2
    undo(model, with_mxfp4_experts)
    batch = ids(batch=4)[mine * (4 // parts) :][: 4 // parts]
    model(batch, labels=batch).loss.backward()
    return whole({key: p.grad for key, p in model.named_parameters()}, model)


@pytest.mark.parametrize("name", ["all to all", "degree"])
def test_gradients_of_what_was_unpacked_are_averaged(ranks: Ranks, name: str) -> None:
    model, batch = tiny_model(**UNEVEN), ids(batch=4)
    model(batch, labels=batch).loss.backward()
    found = ranks(unpacked_replicas, name)[0]
    for key, parameter in model.named_parameters():
        assert relative(found[key], parameter.grad) < 1e-4, key


def of_different_lengths() -> list[Tensor]:
    rank = distributed.get_rank()
    model = shard_experts(tiny_model(**UNEVEN), dispatch="all_to_all")
    # Different numbers of tokens, and of steps.
    return [model.generate(ids(1, 4 + rank, seed=rank), max_new_tokens=3 + 2 * rank, do_sample=False)]


def test_generating_different_lengths_from_tokens_of_their_own(ranks: Ranks) -> None:
    model = tiny_model(**UNEVEN)
    for rank, (tokens,) in enumerate(ranks(of_different_lengths)):
        alone = model.generate(ids(1, 4 + rank, seed=rank), max_new_tokens=3 + 2 * rank, do_sample=False)
        assert torch.equal(tokens, alone)


def replicas(name: str) -> dict[str, Any]:
    """Two ranks share a batch, or have their own; each replica has a half of it. Gradients, gathered."""
    model = tiny_model(**UNEVEN)
    world = distributed.get_world_size()
    if name == "all to all":
        shard_experts(model, dispatch="all_to_all")
        mine, parts = distributed.get_rank(), world
    elif name == "all to all beside tensor parallel":
        mesh = mesh_2d()
        compose(shard_tensor_parallel(mesh=mesh["tp"]), shard_experts(mesh=mesh["ep"], dispatch="all_to_all"))(model)
        mine, parts = mesh.get_local_rank("ep"), world // 2
    elif name == "degree":
        shard_tensor_parallel(model, degree=2)
        mine, parts = distributed.get_rank() // 2, world // 2
    else:
        mesh = mesh_2d(("dp", "tp"))
        compose(shard_experts(mesh=mesh["tp"]), shard_tensor_parallel(mesh=mesh["tp"]))(model)
        mine, parts = mesh.get_local_rank("dp"), world // 2
    batch = ids(batch=4)[mine * (4 // parts) :][: 4 // parts]
    out = model(batch, labels=batch)
    out.loss.backward()
    # Twice, and the mean of that: what is accumulated is averaged once.
    model(batch, labels=batch).loss.backward()
    gradients = {key: p.grad / 2 for key, p in model.named_parameters()}
    return {"logits": out.logits.detach(), "gradients": whole(gradients, model)}


@pytest.mark.parametrize("name", ["mesh", "degree", "all to all", "all to all beside tensor parallel"])
def test_ranks_with_tokens_of_their_own(ranks: Ranks, name: str) -> None:
    model = tiny_model(**UNEVEN)
    batch = ids(batch=4)
    out = model(batch, labels=batch)
    out.loss.backward()
    found = ranks(replicas, name)
    logits = [one["logits"] for one in found]
    step = 1 if name == "all to all" else 2
    assert relative(torch.cat(logits[::step]), out.logits) < 1e-5
    for key, parameter in model.named_parameters():
        assert relative(found[0]["gradients"][key], parameter.grad) < 1e-4, key

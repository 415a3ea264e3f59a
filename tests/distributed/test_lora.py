"""Adapters on 2 and 4 processes: logits and gradients of one process, whatever is spread, and one folder on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from gptoss_opt import (
    CheckpointError,
    CompatibilityError,
    IrreversibleError,
    adapters_off,
    compose,
    gather_state_dict,
    load,
    load_adapter,
    save_adapter,
    shard_experts,
    shard_tensor_parallel,
    stack_of,
    undo,
    with_flash_attention,
    with_lora,
    with_mxfp4_experts,
)
from gptoss_opt.distributed import ModelMesh, Region
from gptoss_opt.distributed import local as local_shards
from gptoss_opt.model.adapters import fingerprints, sum_of_bits
from tests.distributed.models import UNEVEN, whole
from tests.distributed.ranks import Ranks
from tests.distributed.test_full_finetuning import mine
from tests.distributed.test_sharding import balanced, mesh_2d, on_2d
from tests.helpers import GOLDEN, ids, local, relative, tiny_model
from tests.materialised import A, B, Materialised, adapters, begun, gentle

EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "router", "lm_head", "gate_up_proj", "down_proj")
OPTIONS: dict[str, Any] = {"rank": 3, "alpha": 4.5, "targets": EVERY, "train": ("sinks", "norm", "o_proj.bias")}
SCALE = 1.5
SHARDS: dict[str, Callable[[Any], Any]] = {
    "tensor parallel": shard_tensor_parallel,
    "attention only": lambda model: shard_tensor_parallel(model, experts=False, lm_head=False),
    "expert parallel": shard_experts,
    "placed experts": lambda model: balanced()(model),
    "both": lambda model: shard_experts(shard_tensor_parallel(model)),
    "two axes": on_2d,
    "own tokens": lambda model: shard_experts(model, dispatch="all_to_all"),
}
BATCH = 4


def plain(dtype: torch.dtype = torch.float32, packed: bool = False) -> Any:
    model = gentle(dtype, **UNEVEN)
    return with_mxfp4_experts(model) if packed else model


def adapted(dtype: torch.dtype = torch.float32, packed: bool = False, **options: Any) -> Any:
    """A model on one process, all of whose adapters count."""
    return begun(with_lora(plain(dtype, packed), **{**OPTIONS, "dtype": dtype, **options}))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def measured(model: Any, own_tokens: bool = False) -> dict[str, Any]:
    rows = mine(ids(BATCH), own_tokens)
    out = model(rows, labels=rows)
    out.loss.backward()
    gradients = {name: p.grad for name, p in trained(model).items()}
    assert all(p.grad is None for name, p in model.named_parameters() if name not in gradients)
    return {"logits": out.logits.detach(), "loss": out.loss.item(), "gradients": gradients}


def sharded(name: str, dtype: torch.dtype, packed: bool, first: str) -> dict[str, Any]:
    """`measured` of a model that was adapted before it was sharded, or afterwards."""
    if first == "adapted":
        model = SHARDS[name](adapted(dtype, packed))
    else:
        twin = SHARDS[name](adapted(dtype, packed))
        model = with_lora(SHARDS[name](plain(dtype, packed)), **OPTIONS, dtype=dtype)
        assert stack_of(model) == stack_of(twin)
        with torch.no_grad():
            for key, parameter in adapters(model).items():
                assert local(parameter).shape == local(twin.get_parameter(key)).shape
                local(parameter).copy_(local(twin.get_parameter(key)))
    found = measured(model, name == "own tokens")
    split = {
        key: [placement.dim for placement in p.placements if isinstance(placement, Shard)]
        for key, p in adapters(model).items()
        if isinstance(p, DTensor)
    }
    return {**found, "gradients": whole(found["gradients"], model), "split": split}


def alone(dtype: torch.dtype, packed: bool, parts: int = 1) -> dict[str, Any]:
    """What one process has for it; where ranks have their own tokens, the mean of their losses."""
    model = adapted(dtype, packed)
    logits, loss = [], 0.0
    for rows in ids(BATCH).chunk(parts):
        out = model(rows, labels=rows)
        (out.loss / parts).backward()
        logits.append(out.logits.detach())
        loss += out.loss.item() / parts
    return {"logits": torch.cat(logits), "loss": loss, "gradients": {key: p.grad for key, p in trained(model).items()}}


DENSE_AND_PACKED = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])


def test_one_process_has_the_gradients_of_the_reference() -> None:
    """So that all others have."""
    model = begun(with_lora(plain(), **{**OPTIONS, "train": ()}))
    found = measured(model)["gradients"]
    reference = Materialised(model, SCALE, plain())
    exact = reference.gradients(ids(BATCH))
    assert found.keys() == exact.keys()
    assert all(relative(found[key], exact[key]) < 1e-5 for key in exact)


@pytest.mark.parametrize(("packed", "first"), [(False, "adapted"), (True, "sharded")], ids=["dense", "packed"])
@pytest.mark.parametrize("name", SHARDS)
def test_logits_and_gradients_are_those_of_one_process(ranks: Ranks, name: str, packed: bool, first: str) -> None:
    own_tokens, tolerance = name == "own tokens", 1e-5
    exact = alone(torch.float32, packed, ranks.num_ranks if own_tokens else 1)
    found = ranks(sharded, name, torch.float32, packed, first)
    logits = torch.cat([one["logits"] for one in found]) if own_tokens else found[0]["logits"]
    assert relative(logits, exact["logits"]) < tolerance
    assert sum(one["loss"] for one in found) / len(found) == pytest.approx(exact["loss"], rel=1e-6)
    assert own_tokens or all(torch.equal(one["logits"], logits) for one in found)
    gradients = found[0]["gradients"]
    assert gradients.keys() == exact["gradients"].keys()
    for key, gradient in gradients.items():
        assert exact["gradients"][key].any(), key
        assert relative(gradient, exact["gradients"][key]) < tolerance, key


# Mistakes that would be noticed.


def with_a_mistake(name: str, mistake: str) -> dict[str, Any]:
    held = {
        "a factor's gradient is not summed": (local_shards, "all_reduce_gradient", lambda x, group: x),
        "the input's gradient is not summed": (Region, "copy_to_region", lambda self, x: x),
        "gradients are not averaged": (local_shards, "mean_gradient", lambda x, groups, num_ranks: x),
        "results are not summed": (Region, "reduce_from_region", lambda self, x: x),
    }
    owner, attribute, wrong = held[mistake]
    real = getattr(owner, attribute)
    setattr(owner, attribute, wrong)
    try:
        return sharded(name, torch.float32, False, "adapted")
    finally:
        setattr(owner, attribute, real)


@pytest.mark.parametrize(
    ("name", "mistake", "wrong"),
    [
        (
            "tensor parallel",
            "a factor's gradient is not summed",
            {"q_proj.lora_A", "k_proj.lora_A", "v_proj.lora_A", "o_proj.lora_B", "lm_head.lora_A"}
            | {"experts.gate_up_proj_lora_A", "experts.down_proj_lora_B"},
        ),
        (
            "both",
            "the input's gradient is not summed",
            {"q_proj.lora_A", "router.lora_A", "experts.gate_up_proj_lora_B"},
        ),
        ("own tokens", "gradients are not averaged", {"q_proj.lora_A", "router.lora_A", "lm_head.lora_B"}),
        ("expert parallel", "results are not summed", {"q_proj.lora_A", "router.lora_A", "lm_head.lora_B"}),
    ],
)
def test_a_reduction_that_is_left_out_is_noticed(ranks: Ranks, name: str, mistake: str, wrong: set[str]) -> None:
    exact = alone(torch.float32, False, ranks.num_ranks if name == "own tokens" else 1)["gradients"]
    found = ranks(with_a_mistake, name, mistake)[0]["gradients"]
    off = {key for key, gradient in found.items() if relative(gradient, exact[key]) > 1e-2}
    ends = {key.split(".", 3)[-1].split(".", 1)[-1] if "layers" in key else key for key in off if "lora" in key}
    if mistake == "a factor's gradient is not summed":
        assert ends == wrong
    assert wrong <= ends


# Training.


def three_steps(name: str, packed: bool) -> dict[str, Any]:
    """The losses, all that is trained, gathered, and the bits of what every rank holds whole."""
    model = SHARDS[name](adapted(torch.float32, packed)).train()
    frozen = {key: local(p).clone() for key, p in model.named_parameters() if not p.requires_grad}
    losses = steps(model, name == "own tokens")
    assert all(torch.equal(local(model.get_parameter(key)), value) for key, value in frozen.items())
    held = trained(model)
    replicated = {key: local(p.detach()) for key, p in held.items() if not any(map(is_shard, p.placements))}
    assert replicated
    return {"losses": losses, "values": whole({k: p.detach() for k, p in held.items()}, model), "bits": replicated}


def is_shard(placement: Any) -> bool:
    return isinstance(placement, Shard)


def steps(model: Any, own_tokens: bool = False, batch: Callable[[Tensor], Tensor] | None = None) -> list[float]:
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.3)
    losses = []
    for seed in range(3):
        rows = mine(ids(BATCH, seed=seed), own_tokens) if batch is None else batch(ids(BATCH, seed=seed))
        loss = model(rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained(model).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("name", "packed"),
    [("tensor parallel", True), ("expert parallel", False), ("both", True), ("two axes", False), ("own tokens", True)],
)
def test_three_steps_are_those_of_one_process(ranks: Ranks, name: str, packed: bool) -> None:
    model = adapted(torch.float32, packed).train()
    before = {key: p.detach().clone() for key, p in trained(model).items()}
    losses = steps(model)
    found = ranks(three_steps, name, packed)
    for one in found:
        assert one["bits"].keys() == found[0]["bits"].keys()
        assert all(torch.equal(value, found[0]["bits"][key]) for key, value in one["bits"].items())
    for number, loss in enumerate(losses):
        ours = sum(one["losses"][number] for one in found) / len(found)
        assert ours == pytest.approx(loss, rel=1e-4)
    for key, parameter in trained(model).items():
        assert relative(found[0]["values"][key] - before[key], parameter - before[key]) < 1e-3, key


# Dropout.


def with_dropout(name: str, alike: bool, packed: bool) -> dict[str, Any]:
    """What ranks whose users seeded them each in another way compute in training mode."""
    model = SHARDS[name](adapted(torch.float32, packed, dropout=0.4)).train()
    torch.manual_seed(17 + (0 if alike else distributed.get_rank()))
    out = model(ids(BATCH), labels=ids(BATCH))
    out.loss.backward()
    again = model(ids(BATCH)).logits.detach()
    held = {key: p.grad for key, p in trained(model).items()}
    whole_ones = {key: local(g) for key, g in held.items() if not any(map(is_shard, g.placements))}
    return {"logits": out.logits.detach(), "again": again, "bits": whole_ones, "gradients": whole(held, model)}


@pytest.mark.parametrize("alike", [True, False], ids=["seeded alike", "seeded apart"])
@pytest.mark.parametrize(
    ("name", "packed"), [("tensor parallel", False), ("expert parallel", True), ("two axes", True)]
)
def test_dropout_leaves_ranks_alike(ranks: Ranks, name: str, packed: bool, alike: bool) -> None:
    found = ranks(with_dropout, name, alike, packed)
    for one in found:
        assert torch.equal(one["logits"], found[0]["logits"])
        assert torch.equal(one["again"], found[0]["again"])
        assert all(torch.equal(value, found[0]["bits"][key]) for key, value in one["bits"].items())
    assert not torch.equal(found[0]["logits"], found[0]["again"])
    assert relative(found[0]["logits"], adapted(torch.float32, packed)(ids(BATCH)).logits) > 1e-2


def dropout_of_whole_modules(name: str) -> dict[str, Any]:
    model = SHARDS[name](adapted(targets=("q_proj", "k_proj", "router", "lm_head"), dropout=0.4, train=())).train()
    torch.manual_seed(23 + distributed.get_rank())
    found = measured(model)
    return {**found, "gradients": whole(found["gradients"], model)}


@pytest.mark.parametrize("name", ["expert parallel", "tensor parallel"])
def test_dropout_of_what_all_ranks_read_is_that_of_one_process(ranks: Ranks, name: str) -> None:
    """Rows that all have are left out as one process, seeded as the first rank, would leave them out."""
    model = adapted(targets=("q_proj", "k_proj", "router", "lm_head"), dropout=0.4, train=()).train()
    torch.manual_seed(23)
    exact = measured(model)
    found = ranks(dropout_of_whole_modules, name)[0]
    assert relative(found["logits"], exact["logits"]) < 1e-5
    for key, gradient in exact["gradients"].items():
        assert relative(found["gradients"][key], gradient) < 1e-5, key


def without_sharing() -> Tensor:
    model = shard_experts(adapted(dropout=0.4)).train()
    torch.manual_seed(17 + distributed.get_rank())
    real, ModelMesh.share_random_state = ModelMesh.share_random_state, lambda self, device: None
    try:
        return model(ids(BATCH)).logits.detach()
    finally:
        ModelMesh.share_random_state = real


def test_ranks_that_draw_apart_would_be_noticed(ranks: Ranks) -> None:
    first, *others = ranks(without_sharing)
    assert any(not torch.equal(other, first) for other in others)


# Files, undo, switches.


def saved(name: str, folder: Path, packed: bool) -> None:
    model = SHARDS[name](adapted(torch.float32, packed))
    save_adapter(model, folder / "by name")
    model.save_pretrained(folder / "by method", is_main_process=distributed.get_rank() == 0)
    # All ranks come back when it is written.
    assert (folder / "by method" / "adapter_model.safetensors").exists()
    gathered = dict(gather_state_dict(model, only={*adapters(model)}))
    assert len(gathered) == len(adapters(model))
    with pytest.raises(ValueError, match="it has only a part of .*, which is trained"):
        model.save_pretrained(folder / "no", state_dict=model.state_dict())


@pytest.mark.parametrize(("name", "packed"), [("both", False), ("two axes", True), ("placed experts", True)])
def test_ranks_write_the_folder_of_one_process(ranks: Ranks, name: str, packed: bool, tmp_path: Path) -> None:
    ranks(saved, name, tmp_path, packed)
    save_adapter(adapted(torch.float32, packed), tmp_path / "alone")
    for ours in ("by name", "by method"):
        assert sorted(file.name for file in (tmp_path / ours).iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        one, other = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in (ours, "alone"))
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())
        config, expected = (json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in (ours, "alone"))
        assert config == expected
    assert not (tmp_path / "no").exists()


def loaded(name: str, folder: Path, present: bool) -> tuple[Tensor, bool]:
    model = SHARDS[name](with_mxfp4_experts(plain()))
    if present:
        with_lora(model, **{**OPTIONS, "train": ()})
    before = dict(adapters(model))
    assert load_adapter(model, folder) is model
    assert all(p is before[key] for key, p in adapters(model).items() if present)
    undo(load_adapter(model, folder), with_lora)
    return load_adapter(model, folder)(ids()).logits.detach(), True


@pytest.mark.parametrize(("name", "present"), [("both", True), ("two axes", False), ("placed experts", True)])
def test_ranks_read_the_folder_of_one_process(ranks: Ranks, name: str, present: bool, tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        for key, parameter in trained(model).items():
            if "lora" not in key:
                parameter.add_(0.1)
    save_adapter(model, tmp_path)
    for logits, _ in ranks(loaded, name, tmp_path, present):
        assert relative(logits, model(ids()).logits) < 1e-5


def damaged(folder: Path) -> str:
    model = shard_tensor_parallel(plain())
    with pytest.raises(ValueError, match="should be floating point") as error:
        load_adapter(model, folder)
    assert stack_of(model) == compose(shard_tensor_parallel())
    return str(error.value)


def test_another_models_folder_is_refused_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    save_adapter(with_lora(tiny_model(**{**UNEVEN, "intermediate_size": 64}), targets="down_proj"), tmp_path)
    assert len(set(ranks(damaged, tmp_path))) == 1


def readable_here(folder: Path, present: bool) -> str:
    model = shard_tensor_parallel(plain())
    if present:
        with_lora(model, **{**OPTIONS, "train": ()})
    stack, rank = stack_of(model), distributed.get_rank()
    with pytest.raises((CheckpointError, CompatibilityError)) as error:
        load_adapter(model, folder if rank else folder / "nowhere")
    assert stack_of(model) == stack
    assert not any(local(p).any() for name, p in adapters(model).items() if name.endswith(B))
    load_adapter(model, folder)
    return f"{type(error.value).__name__}: {error.value}"


@pytest.mark.parametrize("present", [False, True], ids=["plain", "adapted"])
def test_a_folder_that_one_rank_cannot_read_is_an_error_on_all(ranks: Ranks, present: bool, tmp_path: Path) -> None:
    save_adapter(adapted(train=()), tmp_path)
    first, *others = ranks(readable_here, tmp_path, present)
    assert re.match(r"CheckpointError: .*nowhere: there is no adapter_config.json", first)
    assert all("on rank 0: CheckpointError: " in other and "nowhere" in other for other in others)


def not_written(folder: Path) -> str:
    model = shard_experts(adapted())
    with pytest.raises(OSError, match="rank 0|Not a directory|File exists") as error:
        save_adapter(model, folder / "a file")
    with pytest.raises(IrreversibleError, match="trained and not saved"):
        undo(model, with_lora)
    return str(error.value)


def test_what_cannot_be_written_is_said_on_every_rank(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    found = ranks(not_written, tmp_path)
    assert all("rank 0 could not write" in text for text in found[1:])


def undone(folder: Path) -> None:
    """Trained on one rank's experts alone: all ranks refuse alike."""
    model = with_lora(shard_tensor_parallel(shard_experts(plain())), **OPTIONS)
    twin = with_lora(shard_tensor_parallel(shard_experts(plain())), **OPTIONS)
    undo(twin, with_lora)
    if distributed.get_rank() == 0:
        with torch.no_grad():
            local(model.model.layers[0].mlp.experts.down_proj_lora_B).add_(1)
    for take_off in (lambda: undo(model, with_lora), lambda: undo(model, "with_lora")):
        with pytest.raises(IrreversibleError, match="trained and not saved"):
            take_off()
    save_adapter(model, folder)
    undo(model, with_lora)
    assert not adapters(model)
    assert len(stack_of(model)) == 2
    # What is trained, then spread otherwise, is still what was saved.
    model = adapted()
    save_adapter(model, folder / str(distributed.get_rank()))  # each rank has all of it
    undo(shard_experts(shard_tensor_parallel(model)), with_lora)
    model = shard_tensor_parallel(adapted())
    undo(model, with_lora, discard=True)


def test_undo_is_refused_on_all_ranks_alike(ranks: Ranks, tmp_path: Path) -> None:
    ranks(undone, tmp_path)


def different_undo() -> str:
    model = compose(with_lora(**OPTIONS), with_flash_attention(), shard_tensor_parallel())(plain())
    begun_here = [local(p) for name, p in adapters(model).items() if name.endswith(B)]
    with torch.no_grad():
        begun_here[0].add_(1)
    with pytest.raises(CompatibilityError) as error:
        undo(model, with_lora if distributed.get_rank() == 0 else with_flash_attention)
    return str(error.value)


def test_ranks_that_take_off_different_things_are_told(ranks: Ranks) -> None:
    for told in ranks(different_undo):
        assert "with_lora, shard_tensor_parallel" in told
        assert "with_flash_attention, shard_tensor_parallel" in told


def switched_off(name: str) -> float:
    model = SHARDS[name](adapted(packed=True))
    on = model(ids()).logits
    with adapters_off(model):
        off = model(ids()).logits
    assert torch.equal(model(ids()).logits, on)
    assert relative(on, off) > 1e-2
    return relative(off, plain()(ids()).logits)


def test_adapters_off(ranks: Ranks) -> None:
    assert max(ranks(switched_off, "two axes")) < 1e-5


def generated() -> tuple[list[int], list[int]]:
    model = shard_tensor_parallel(adapted(packed=True))
    options = {"max_new_tokens": 8, "do_sample": False}
    with adapters_off(model):
        off = model.generate(ids(1, 9), **options)
    return model.generate(ids(1, 9), **options)[0].tolist(), off[0].tolist()


def test_generates_as_one_process(ranks: Ranks) -> None:
    options = {"max_new_tokens": 8, "do_sample": False}
    on, off = (model.generate(ids(1, 9), **options)[0].tolist() for model in (adapted(), plain()))
    assert ranks(generated) == [(on, off)] * ranks.num_ranks
    assert on != off


def on_the_checkpoint(packed: bool) -> None:
    """Loaded with adapters, or adapted afterwards: the same bits, and all of it while each rank reads its own."""
    packing = (with_mxfp4_experts(),) if packed else ()
    options = {"rank": 2, "targets": EVERY}
    one = load(GOLDEN, with_lora(**options), *packing, shard_tensor_parallel(degree=2), dtype=torch.float32)
    two = with_lora(load(GOLDEN, *packing, shard_tensor_parallel(degree=2), dtype=torch.float32), **options)
    assert stack_of(one) == stack_of(two)
    for (key, value), (other, twin) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(value.to_local(), twin.to_local())
    assert trained(one).keys() == trained(two).keys() == adapters(one).keys()


@DENSE_AND_PACKED
def test_loading_with_adapters(ranks: Ranks, packed: bool) -> None:
    ranks(on_the_checkpoint, packed)


def split_alike() -> dict[str, list[int]]:
    model = shard_tensor_parallel(with_lora(plain(), targets=EVERY))
    return {key: [p.dim for p in value.placements if is_shard(p)] for key, value in adapters(model).items()}


def test_adapters_are_split_as_what_they_stand_beside(ranks: Ranks) -> None:
    found = ranks(split_alike)[0]
    layer = "model.layers.0"
    expected = {
        "self_attn.q_proj.": ([], [0]),
        "self_attn.o_proj.": ([1], []),
        "mlp.router.": ([], []),
        "mlp.experts.gate_up_proj_": ([], [1]),
        "mlp.experts.down_proj_": ([2], []),
    }
    for name, (of_a, of_b) in expected.items():
        assert (found[f"{layer}.{name}{A}"], found[f"{layer}.{name}{B}"]) == (of_a, of_b)
    assert (found[f"lm_head.{A}"], found[f"lm_head.{B}"]) == ([], [0])


# FSDP2.


def under_fsdp(model: Any, mesh: Any = None) -> Any:
    options = {} if mesh is None else {"mesh": mesh}
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def replica_of(axis: Any) -> Callable[[Tensor], Tensor]:
    """The rows of a batch that are of this rank, or of all ranks of its replica."""
    return lambda rows: rows.chunk(axis.size())[axis.get_local_rank()]


def fsdp_curve(axes: tuple[str, str] | None, packed: bool, folder: Path) -> dict[str, Any]:
    """Three steps, and what is saved then, of adapters under FSDP2: over all ranks, or over the first of two axes."""
    options = {"train": ("sinks", "norm")}
    if axes is None:
        model, dp = adapted(packed=packed, **options), None
        batch = lambda rows: mine(rows, True)  # noqa: E731
    else:
        mesh = mesh_2d(axes)
        dp, wrap = mesh[axes[0]], shard_tensor_parallel if axes[1] == "tp" else shard_experts
        model, batch = wrap(adapted(packed=packed, **options), mesh=mesh[axes[1]]), replica_of(dp)
    under_fsdp(with_flash_attention(model), dp)
    held = sum(local(p).nbytes for p in model.parameters())
    losses = steps(model, batch=batch)
    with torch.no_grad():
        logits = model(ids()).logits
    save_adapter(model, folder / "ours")
    model.save_pretrained(folder / "by method", is_main_process=distributed.get_rank() == 0)
    whole_ones = dict(gather_state_dict(model, only={*trained(model)}))
    assert all((value is not None) == (distributed.get_rank() == 0) for value in whole_ones.values())
    sums = fingerprints(model)
    if distributed.get_rank() == 0:
        assert sums == {key: sum_of_bits(whole_ones[key]) for key in sums}
    # What is read goes into what FSDP holds, also where the forward before has left parameters whole.
    before = dict(adapters(model))
    load_adapter(model, folder / "start")
    with torch.no_grad():
        again = model(ids()).logits
    assert adapters(model).keys() == before.keys()
    return {"losses": losses, "logits": logits, "again": again, "held": held, "sums": sums}


@DENSE_AND_PACKED
@pytest.mark.parametrize("axes", [None, ("dp", "tp"), ("dp", "ep")], ids=["all ranks", "beside tp", "beside ep"])
def test_fsdp2(ranks: Ranks, axes: tuple[str, str] | None, packed: bool, tmp_path: Path) -> None:
    options = {"train": ("sinks", "norm")}
    model = adapted(packed=packed, **options)
    save_adapter(model, tmp_path / "start")
    start = model(ids()).logits.detach()
    held = sum(p.nbytes for p in model.parameters())
    losses = steps(model)
    found = ranks(fsdp_curve, axes, packed, tmp_path)
    for number, loss in enumerate(losses):
        assert sum(one["losses"][number] for one in found) / len(found) == pytest.approx(loss, rel=1e-4)
    for one in found:
        assert relative(one["logits"], model(ids()).logits) < 1e-4
        assert relative(one["again"], start) < 1e-5
        assert one["held"] < 0.75 * held, "nothing was sharded"
        assert one["sums"] == found[0]["sums"]
    assert relative(start, model(ids()).logits) > 1e-2
    for folder in ("ours", "by method"):
        twin = load_adapter(plain(packed=packed), tmp_path / folder)
        for key, parameter in trained(model).items():
            assert relative(twin.get_parameter(key), parameter) < 1e-4, key


def in_ddp(folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    model = adapted(packed=True, train=())
    around = DistributedDataParallel(with_flash_attention(model))
    losses = steps(around, own_tokens=True)
    with adapters_off(around):
        assert relative(around(ids()).logits, plain()(ids()).logits) < 1e-5
    if distributed.get_rank() == 0:
        save_adapter(around, folder)
    distributed.barrier()
    return losses, {key: p.detach() for key, p in trained(load_adapter(model, folder)).items()}


def test_ddp(ranks: Ranks, tmp_path: Path) -> None:
    model = adapted(packed=True, train=())
    losses, found = steps(model), ranks(in_ddp, tmp_path)
    for number, loss in enumerate(losses):
        assert sum(one[number] for one, _ in found) / len(found) == pytest.approx(loss, rel=1e-4)
    for _, values in found:
        for key, parameter in trained(model).items():
            assert relative(values[key], parameter) < 1e-4, key
            assert torch.equal(values[key], found[0][1][key])


def fsdp_without_the_mean() -> list[float]:
    """Each rank trains replicas of its own, as if nothing met."""
    model = adapted(train=("sinks", "norm"))
    return steps(model, batch=lambda rows: mine(rows, True))


def test_a_mean_that_is_left_out_under_fsdp_would_be_noticed(ranks: Ranks) -> None:
    losses, found = steps(adapted(train=("sinks", "norm"))), ranks(fsdp_without_the_mean)
    assert sum(one[0] for one in found) / len(found) == pytest.approx(losses[0], rel=1e-4)
    assert abs(sum(one[2] for one in found) / len(found) / losses[2] - 1) > 1e-3


def under_fsdp_already() -> None:
    model = under_fsdp(plain())
    with pytest.raises(CompatibilityError, match="adds .*lora_A, and FSDP, .* would not know of it. Wrap before that"):
        with_lora(model)
    assert not stack_of(model)
    model = under_fsdp(adapted())
    with pytest.raises(CompatibilityError, match=r"lora_A would be dropped, and is held by FSDP.* Undo before that"):
        undo(model, with_lora, discard=True)
    assert len(stack_of(model)) == 1
    with_flash_attention(model)
    losses = steps(model, own_tokens=True)
    assert losses[0] > 0


def test_wrapping_under_fsdp_is_refused(ranks: Ranks) -> None:
    ranks(under_fsdp_already)


def low_precision(dtype: torch.dtype, train: tuple[str, ...]) -> list[float]:
    """bfloat16 beside adapters of another dtype, with and without more that is trained."""
    model = begun(with_lora(plain(torch.bfloat16, packed=True), rank=3, dtype=dtype, train=train))
    return steps(under_fsdp(model), own_tokens=True)


@pytest.mark.parametrize(("dtype", "train"), [(torch.float32, ()), (torch.bfloat16, ("sinks",))])
def test_fsdp2_in_bfloat16(ranks: Ranks, dtype: torch.dtype, train: tuple[str, ...]) -> None:
    model = begun(with_lora(plain(torch.bfloat16, packed=True), rank=3, dtype=dtype, train=train))
    losses, found = steps(model), ranks(low_precision, dtype, train)
    for number, loss in enumerate(losses):
        assert sum(one[number] for one in found) / len(found) == pytest.approx(loss, rel=5e-2)

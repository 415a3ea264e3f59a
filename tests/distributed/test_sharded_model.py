"""What a sharded model is to its user: collectives, loading, saving, explaining, copies, refusals."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import re
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GptOssForCausalLM

from gptoss_opt import (
    CheckpointError,
    CompatibilityError,
    IrreversibleError,
    Stack,
    balance_experts,
    compose,
    explain,
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
from gptoss_opt.checkpoint import Checkpoint
from gptoss_opt.checkpoint import reader as safetensors_file
from gptoss_opt.distributed import agreement
from tests.distributed.models import UNEVEN
from tests.distributed.ranks import RankError, Ranks
from tests.distributed.test_sharding import LOAD, WRAPS, balanced, mesh_2d
from tests.helpers import GOLDEN, gradients, ids, relative, tiny_config, tiny_model

COLLECTIVES = ("all_reduce", "all_gather", "broadcast", "all_to_all_single", "send", "recv")


class Counted:
    """Counts the collectives of this rank, and the bytes given to each."""

    def __enter__(self) -> Counted:
        self.calls: Counter[str] = Counter()
        self.shapes: list[tuple[str, tuple[int, ...]]] = []
        self.real = {name: getattr(distributed, name) for name in COLLECTIVES}
        for name, call in self.real.items():
            setattr(distributed, name, self.counting(name, call))
        return self

    def counting(self, name: str, call: Any) -> Any:
        def counted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            self.shapes.append((name, tuple((args[0] if name == "all_gather" else tensor).shape)))
            return call(tensor, *args, **kwargs)

        return counted

    def __exit__(self, *error: object) -> None:
        for name, call in self.real.items():
            setattr(distributed, name, call)


def collectives(name: str) -> tuple[Counter[str], set[tuple[str, tuple[int, ...]]]]:
    model = WRAPS[name](tiny_model(**UNEVEN))
    with Counted() as counted, torch.no_grad():
        model(ids(2, 5))
    return counted.calls, set(counted.shapes)


@pytest.mark.parametrize(
    ("name", "all_reduces"),
    [("tensor parallel", 5), ("attention only", 2), ("expert parallel", 2), ("tensor, then expert parallel", 5)],
)
def test_two_all_reduces_per_layer_and_nothing_else(ranks: Ranks, name: str, all_reduces: int) -> None:
    # Two layers, and one after the embedding; and the logits are gathered.
    vocabulary = all_reduces == 5
    for calls, shapes in ranks(collectives, name):
        assert calls == Counter({"all_reduce": all_reduces, **({"all_gather": 1} if vocabulary else {})})
        per_token = {shape[-1] for kind, shape in shapes if kind == "all_reduce"}
        assert per_token == {64}
        assert {math.prod(shape[:-1]) for _, shape in shapes} == {10}


def loaded(path: Any, name: str, packed: bool, small: int | None) -> dict[str, Any]:
    """What a rank has after loading with wrappers: its own bytes, those it read, and those of wrapping afterwards."""
    world = distributed.get_world_size()
    golden_load = [[3.0, 1, 1, 1, 2, 2]] * 3
    wraps = {
        "tensor parallel": (shard_tensor_parallel(degree=2),),
        "expert parallel": (shard_experts(),),
        "placed experts": (shard_experts(placement=balance_experts(golden_load, world)),),
        "both": (shard_tensor_parallel(degree=2), shard_experts(degree=2)),
    }[name]
    read, real = [], safetensors_file._Source.tell
    if small is not None:
        safetensors_file.SMALL = small
    safetensors_file._Source.tell = lambda self, count: (read.append(count), real(self, count))
    try:
        packing = (with_mxfp4_experts(),) if packed else ()
        model = load(path, *wraps, *packing, dtype=torch.float32)
    finally:
        safetensors_file._Source.tell = real
        safetensors_file.SMALL = 64 << 10
    after = load(path, *packing, dtype=torch.float32)
    for wrapper in wraps:
        after = wrapper(after)
    assert stack_of(after) == stack_of(model)
    same = zip(model.state_dict().items(), after.state_dict().items(), strict=True)
    for (key, one), (other_key, other) in same:
        assert key == other_key
        assert torch.equal(one.to_local(), other.to_local()), key
    assert torch.equal(model(ids()).logits, after(ids()).logits)
    dtypes = {key: info.dtype.itemsize for key, info in Checkpoint.open(path).tensors.items()}
    mine = sum(p.to_local().numel() * dtypes.get(key, 0) for key, p in model.state_dict().items())
    total = sum(info.num_bytes for info in Checkpoint.open(path).tensors.values())
    return {"read": sum(read), "mine": mine, "total": total}


@pytest.mark.parametrize("name", ["tensor parallel", "expert parallel", "placed experts", "both"])
def test_loading_reads_what_the_rank_holds(ranks: Ranks, name: str) -> None:
    for found in ranks(loaded, GOLDEN, name, True, 1):
        # Every tensor of the checkpoint is held as it is there, so that the bytes are known.
        assert found["read"] == found["mine"]
        assert found["mine"] < 0.75 * found["total"]


@pytest.mark.parametrize("name", ["tensor parallel", "placed experts", "both"])
def test_loading_unpacks_what_the_rank_holds(ranks: Ranks, name: str) -> None:
    for found in ranks(loaded, GOLDEN, name, False, None):
        assert found["read"] <= found["total"]


def loaded_where_one_cannot(path: str) -> str:
    with pytest.raises((CompatibilityError, CheckpointError)) as error:
        load(path if distributed.get_rank() else "/nowhere", shard_tensor_parallel(degree=2), dtype=torch.float32)
    return str(error.value)


def test_a_checkpoint_that_one_rank_cannot_read_is_an_error_on_all(ranks: Ranks) -> None:
    first, *others = ranks(loaded_where_one_cannot, str(GOLDEN))
    assert "/nowhere" in first
    for other in others:
        assert re.fullmatch(r"cannot apply this stack:\n  - on rank 0: CheckpointError: /nowhere.*", other), other


def saved(folder: Path, name: str, options: dict[str, Any]) -> None:
    model = WRAPS[name](tiny_model(**UNEVEN))
    model.save_pretrained(folder, **options)
    # All ranks come back when it is written.
    assert (folder / "config.json").exists()


@pytest.mark.parametrize(
    "name", ["tensor parallel", "placed experts beside tensor parallel", "two axes", "placed, then packed"]
)
def test_saves_what_one_process_saves(ranks: Ranks, tmp_path: Path, name: str) -> None:
    ours, alone = tmp_path / "ours", tmp_path / "alone"
    ranks(saved, ours, name, {})
    model = tiny_model(**UNEVEN)
    (with_mxfp4_experts(model) if "packed" in name else model).save_pretrained(alone)
    one, other = load_file(ours / "model.safetensors"), load_file(alone / "model.safetensors")
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype
        assert torch.equal(tensor, other[key]), key
    for file in ("config.json", "generation_config.json"):
        assert json.loads((ours / file).read_text()) == json.loads((alone / file).read_text())
    plain = AutoModelForCausalLM.from_pretrained(ours, dtype=torch.float32).float().eval()
    assert relative(plain(ids()).logits, tiny_model(**UNEVEN)(ids()).logits) < 1e-5


def test_saves_several_files_over_those_of_before(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"stale")
    (tmp_path / "model-00001-of-00099.safetensors").write_bytes(b"stale")
    (tmp_path / "notes.txt").write_text("mine")
    ranks(saved, tmp_path, "tensor parallel", {"max_shard_size": "100KB"})
    files = sorted(file.name for file in tmp_path.iterdir())
    assert "model-00001-of-00099.safetensors" not in files
    assert "model.safetensors" not in files
    assert {"notes.txt", "model.safetensors.index.json"} <= set(files)
    assert len([name for name in files if re.fullmatch(r"model-\d{5}-of-000\d\d.safetensors", name)]) > 4
    assert not [name for name in files if name.endswith(".part")]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert relative(plain(ids()).logits, tiny_model(**UNEVEN)(ids()).logits) < 1e-5


def cannot_be_written(folder: Path) -> list[str]:
    model = shard_tensor_parallel(tiny_model(**UNEVEN))
    with pytest.raises(OSError, match="rank 0|Not a directory") as disk:
        model.save_pretrained(folder / "a file" / "below")
    with pytest.raises(ValueError, match="variant") as option:
        model.save_pretrained(folder, variant="fp8")
    return [str(disk.value), str(option.value)]


def test_what_cannot_be_written_is_said_on_every_rank(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    for rank, (disk, option) in enumerate(ranks(cannot_be_written, tmp_path)):
        assert "Not a directory" in disk
        assert rank == 0 or "rank 0 could not write the checkpoint" in disk
        assert option.startswith("save_pretrained(variant='fp8') is not served on a sharded model")


def gathered(name: str) -> dict[str, Any]:
    return dict(gather_state_dict(WRAPS[name](tiny_model(**UNEVEN))))


def test_gather_state_dict(ranks: Ranks) -> None:
    first, *others = ranks(gathered, "placed experts beside tensor parallel")
    model = tiny_model(**UNEVEN)
    assert list(first) == list(model.state_dict())
    assert all(torch.equal(first[key], value) for key, value in model.state_dict().items())
    assert all(value is None for other in others for value in other.values())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in gather_state_dict(model))


def explained() -> tuple[str, float]:
    model = tiny_model(**UNEVEN)
    whole = sum(p.nbytes for p in model.parameters())
    shard_experts(shard_tensor_parallel(model))
    mine = sum(p.to_local().nbytes for p in model.parameters())
    return str(explain(model)), mine / whole


def test_explain_tells_what_a_rank_holds_and_what_it_sends(ranks: Ranks) -> None:
    for rank, (text, share) in enumerate(ranks(explained)):
        (mine, whole) = map(float, re.search(r"holds ([\d.]+) of ([\d.]+) MB", text).groups())
        assert text.startswith(f"GptOssForCausalLM: 2 wrappers; rank {rank} (tp={rank}) holds")
        assert mine / whole == pytest.approx(share, rel=0.05)
        flat = " ".join(text.replace("|", " ").split())
        assert "2 all-reduces of" in flat
        assert "1 all-gather of" in flat


def parts_of_what_is_shared() -> float:
    """The share of the bytes that this rank holds, of all that can be split."""
    model = tiny_model(**{**UNEVEN, "num_local_experts": 8, "vocab_size": 128})
    names = [name for name, _ in model.named_parameters() if not re.search(r"norm|router|o_proj.bias", name)]
    whole = sum(model.get_parameter(name).nbytes for name in names)
    shard_experts(shard_tensor_parallel(model))
    return sum(model.get_parameter(name).to_local().nbytes for name in names) / whole


def test_each_rank_holds_its_share(ranks: Ranks) -> None:
    assert ranks(parts_of_what_is_shared) == [1 / ranks.num_ranks] * ranks.num_ranks


def cannot_be_undone() -> None:
    model = with_flash_attention(shard_tensor_parallel(tiny_model(**UNEVEN)))
    logits = model(ids()).logits
    for attempt in (lambda: undo(model), lambda: undo(model, shard_tensor_parallel)):
        with pytest.raises(IrreversibleError, match=r"shard_tensor_parallel\(\) cannot be taken off: it dropped data"):
            attempt()
    assert torch.equal(model(ids()).logits, logits)
    undo(model, with_flash_attention)
    assert stack_of(model) == compose(shard_tensor_parallel())
    assert relative(model(ids()).logits, logits) < 1e-5
    # Packing can be, and what is left is what this rank holds.
    undo(with_mxfp4_experts(model), with_mxfp4_experts)
    assert relative(model(ids()).logits, logits) < 1e-5


def test_sharding_cannot_be_undone_and_all_else_can(ranks: Ranks) -> None:
    ranks(cannot_be_undone)


def copied() -> None:
    model = shard_tensor_parallel(balanced()(with_flash_attention(tiny_model(**UNEVEN))))
    logits = model(ids()).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert stack_of(twin) == stack_of(model)
        assert torch.equal(twin(ids()).logits, logits)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(2)
        assert twin.generate(ids(1, 4), max_new_tokens=2).shape == (1, 6)
        assert not torch.equal(twin(ids()).logits, logits)
        assert torch.equal(model(ids()).logits, logits)
        undo(twin, with_flash_attention)
        assert len(stack_of(model)) == 3
    state = {key: value + 0 for key, value in model.state_dict().items()}
    fresh = shard_tensor_parallel(balanced()(with_flash_attention(tiny_model(seed=5, **UNEVEN))))
    assert not torch.equal(fresh(ids()).logits, logits)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(ids()).logits, logits)


def test_copies_and_state_dicts(ranks: Ranks) -> None:
    ranks(copied)


def checkpointed() -> float:
    model = shard_tensor_parallel(tiny_model(**UNEVEN)).train()
    model(ids(), labels=ids()).loss.backward()
    exact = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(ids(), labels=ids(), use_cache=False).loss.backward()
    found = gradients(model)
    return max(relative(found[name], exact[name]) for name in exact)


def test_gradient_checkpointing(ranks: Ranks) -> None:
    assert max(ranks(checkpointed)) < 1e-5


def compiled() -> float:
    import warnings

    model = compose(shard_tensor_parallel(), with_flash_attention(), with_fast_experts())(tiny_model(**UNEVEN))
    model(ids(), labels=ids()).loss.backward()
    exact = gradients(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = torch.compile(model, backend="aot_eager")
        run(ids(), labels=ids()).loss.backward()
    found = gradients(model)
    assert found.keys() == exact.keys()
    return max(relative(found[name], exact[name]) for name in exact)


def test_compiles(ranks: Ranks) -> None:
    assert max(ranks(compiled)) < 1e-4


def in_bfloat16() -> float:
    exact = tiny_model(**UNEVEN)(ids()).logits
    model = shard_tensor_parallel(with_flash_attention(tiny_model(**UNEVEN))).to(torch.bfloat16)
    assert all(isinstance(p, DTensor) and p.dtype == torch.bfloat16 for p in model.parameters())
    plain = tiny_model(**UNEVEN).to(torch.bfloat16)(ids()).logits
    return relative(model(ids()).logits, exact) / relative(plain, exact)


def test_cast_after_sharding(ranks: Ranks) -> None:
    assert max(ranks(in_bfloat16)) < 2


def refused(name: str) -> str:
    world = distributed.get_world_size()
    small = UNEVEN | {"num_local_experts": world - 1 or 1, "num_experts_per_tok": 1}
    attempts: dict[str, Any] = {
        "heads": lambda: shard_tensor_parallel(tiny_model(num_key_value_heads=1)),
        "blocks": lambda: shard_tensor_parallel(tiny_model(**UNEVEN | {"intermediate_size": 32})),
        "odd sizes": lambda: shard_tensor_parallel(GptOssForCausalLM(tiny_config(intermediate_size=40))),
        "experts": lambda: shard_experts(tiny_model(**small)),
        "degree": lambda: shard_tensor_parallel(tiny_model(**UNEVEN), degree=3),
        "two axes": lambda: shard_tensor_parallel(tiny_model(**UNEVEN), mesh=mesh_2d()),
        "both": lambda: shard_experts(tiny_model(**UNEVEN), mesh=mesh_2d()["tp"], degree=8),
        "another shape": lambda: shard_experts(tiny_model(**UNEVEN), mesh={"ep": 3, "tp": 2}),
        "one on a shape": lambda: compose(shard_experts(mesh={"ep": world // 2, "tp": 2}), shard_tensor_parallel())(
            tiny_model(**UNEVEN)
        ),
        "other meshes": lambda: compose(shard_experts(degree=1), shard_tensor_parallel())(tiny_model(**UNEVEN)),
        "shared and own tokens": lambda: compose(shard_tensor_parallel(), shard_experts(dispatch="all_to_all"))(
            tiny_model(**UNEVEN)
        ),
        "what rank trains": lambda: shard_experts(tiny_model(**UNEVEN).requires_grad_(distributed.get_rank() == 0)),
        "what rank holds": lambda: shard_experts(tiny_model(**UNEVEN, seed=distributed.get_rank())),
        "after FSDP": lambda: shard_experts(fully_shard(tiny_model(**UNEVEN), mesh=init_distributed(device="cpu"))),
        "placement": lambda: shard_experts(tiny_model(**UNEVEN), placement=[[[0, 1]] * world] * 2),
        "layers": lambda: shard_experts(tiny_model(**UNEVEN), placement=balance_experts(LOAD[:1], world)),
        "a rank": lambda: shard_tensor_parallel(
            tiny_model(**UNEVEN | {"num_hidden_layers": 2 + distributed.get_rank()})
        ),
        "options": lambda: shard_tensor_parallel(tiny_model(**UNEVEN), lm_head=distributed.get_rank() == 0),
        "wrappers": lambda: (shard_experts if distributed.get_rank() else shard_tensor_parallel)(tiny_model(**UNEVEN)),
        "one rank's model": lambda: shard_experts(
            torch.compile(tiny_model(**UNEVEN), backend="eager") if distributed.get_rank() else tiny_model(**UNEVEN)
        ),
        "one rank's other options": lambda: compose(
            shard_tensor_parallel(), with_flash_attention(backend="torch" if distributed.get_rank() else "reference")
        )(tiny_model(**UNEVEN)),
    }
    with pytest.raises(CompatibilityError) as error:
        attempts[name]()
    return str(error.value)


REFUSALS = {
    "heads": r"1 key/value heads do not divide over \d ranks. Use 1",
    "blocks": r"intermediate_size 32 has 1 blocks of 32, too few for \d ranks. Use experts=False, and shard_experts",
    "odd sizes": r"intermediate_size is 40, no multiple of 32",
    "experts": r"\d experts do not go on \d ranks: one would have none",
    "degree": r"degree=3 does not divide the \d processes there are",
    "two axes": r"the mesh has 2 axes, \('ep', 'tp'\). Give one of them, such as mesh\['tp'\]",
    "both": r"degree=8, but axis 'tp' of the mesh has 2 ranks",
    "another shape": r"a mesh \{'ep': 3, 'tp': 2\} is of 6 ranks, and there are \d processes. Start 6",
    "one on a shape": r"are no axes of one mesh. Give the same axis to both, or make a mesh of two",
    "other meshes": r"are no axes of one mesh. Give the same axis to both, or make a mesh of two",
    "shared and own tokens": r"have tokens of their own by one wrapper .*Use dispatch='all_reduce', or give each",
    "what rank trains": r"disagree on parameter .*trained, sample .* on rank 0; .*frozen, sample .*and on \d+ more",
    "what rank holds": r"disagree on parameter .*sample .* on rank 0; .*sample .* on rank 1.*and on \d+ more",
    "after FSDP": r"is a DTensor, which something else has made of it .*Wrap and undo before that",
    "placement": r"the placement of layer 0 holds the experts \[0, 0, .*Name each of the 6 once",
    "layers": r"the placement is for 1 layers, and the model has 2",
    "a rank": r"the ranks disagree on config.num_hidden_layers: 2 on rank 0; 3 on rank 1",
    "options": r"the ranks disagree on lm_head of shard_tensor_parallel: True on rank 0; False on rank 1",
    "wrappers": r"the ranks disagree on the wrappers: shard_tensor_parallel on rank 0; shard_experts on rank 1",
    "one rank's model": r"this model is already torch.compiled",
    "one rank's other options": r"on backend of with_flash_attention: 'reference' on rank 0; 'torch' on rank 1",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_on_every_rank_before_anything_is_touched(ranks: Ranks, name: str) -> None:
    for said in ranks(refused, name):
        assert re.search(REFUSALS[name], said, re.DOTALL), said


def misused(name: str) -> str:
    """What is said of a sharded model that is used in a way that it cannot be."""
    model = tiny_model(**UNEVEN)
    (shard_experts if name == "implementation" else shard_tensor_parallel)(model)
    if name == "implementation":
        model.set_experts_implementation("batched_mm")
    (gradient,) = torch.autograd.grad(
        model(ids(), labels=ids()).loss if name == "second derivatives" else model.model.norm.weight.sum(),
        [model.model.norm.weight],
        create_graph=True,
    )
    uses = {
        "implementation": lambda: model(ids()),
        "attentions": lambda: model(ids(), output_attentions=True),
        "tokens": lambda: model(torch.full((1, 3), 131)),
        "second derivatives": lambda: gradient.to_local().square().sum().backward(),
    }
    with pytest.raises((ValueError, IndexError, RuntimeError)) as error:
        uses[name]()
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "implementation": "'batched_mm' knows nothing of experts on other ranks",
        "attentions": "output_attentions: each rank has the weights of its own heads only",
        "tokens": "a token id is outside the vocabulary of 131",
        "second derivatives": "once_differentiable",
    }.items(),
)
def test_misuse_is_said_on_every_rank(ranks: Ranks, name: str, said: str) -> None:
    assert all(said in found for found in ranks(misused, name))


def used_further(folder: Path) -> None:
    """Saving, freezing, adding modules, keyword calls: what users do between one wrapper and the next."""
    model = shard_tensor_parallel(tiny_model(**UNEVEN))
    logits = model(ids()).logits
    model.save_pretrained(folder)
    model.extra = torch.nn.Linear(4, 4)
    assert "holds" in str(explain(model))
    model.requires_grad_(False)
    shard_experts(with_flash_attention(model))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.extra(torch.ones(1, 4))
    assert relative(model(ids()).logits, logits) < 1e-5
    hidden = model.model.embed_tokens(input=ids())
    assert model.lm_head(input=hidden).shape[-1] == 131


def test_a_sharded_model_goes_on_as_a_model(ranks: Ranks, tmp_path: Path) -> None:
    ranks(used_further, tmp_path)


def failing_save(folder: Path) -> str:
    model = shard_tensor_parallel(tiny_model(**UNEVEN))
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, False
    with pytest.raises((ValueError, OSError)) as error:
        model.save_pretrained(folder)
    return str(error.value)


def test_any_failure_to_save_is_said_on_every_rank(ranks: Ranks, tmp_path: Path) -> None:
    first, *others = ranks(failing_save, tmp_path)
    assert "GenerationConfig" in first
    assert all("rank 0 could not write the checkpoint" in other for other in others)


def hangs_in_a_forward(port: int) -> float:
    """A rank stops in the middle; how long the other, which waits two seconds at most, took to say so."""
    rank = distributed.get_rank()
    distributed.destroy_process_group()
    store = distributed.TCPStore("127.0.0.1", port, None, False)
    timeout = timedelta(seconds=2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
    model = shard_tensor_parallel(tiny_model(**UNEVEN))
    if rank == 1:
        time.sleep(8)
        return 0.0
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"[Tt]imed? ?out"):
        model(ids())
    return time.monotonic() - begin


def test_a_rank_that_hangs_ends_the_others_in_time() -> None:
    ranks = Ranks(2)
    store = distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    taken, _ = ranks(hangs_in_a_forward, store.port)
    ranks.stop()
    assert 1 < taken < 6


def comes_late() -> str:
    """Rank 0 gives up on the others, which then come; when it tries again, all meet."""
    store = distributed.distributed_c10d._get_default_store()
    before, rank = store.timeout, distributed.get_rank()
    if rank == 0:
        store.set_timeout(timedelta(seconds=1))
        with pytest.raises(TimeoutError, match=r"rank 0 waited 1 s for rank 1, .*which did not wrap its model"):
            shard_tensor_parallel(tiny_model(**UNEVEN), lm_head=False)
        store.set_timeout(before)
        store.set(f"gave up {distributed.get_world_size()}", "")
    store.wait([f"gave up {distributed.get_world_size()}"])
    with pytest.raises(CompatibilityError) as error:
        shard_tensor_parallel(tiny_model(**UNEVEN), lm_head=rank == 0)
    return str(error.value)


def test_a_rank_that_gave_up_is_met_again_and_not_taken_at_its_word_of_before(ranks: Ranks) -> None:
    for said in ranks(comes_late):
        assert "the ranks disagree on lm_head of shard_tensor_parallel: True on rank 0; False on rank 1" in said


def after_a_failure() -> None:
    model = tiny_model(**UNEVEN)
    before = {path: set(module.__dict__) for path, module in model.named_modules()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptoss_opt.wrappers.tensor_parallel.attach_attention", None)
        with pytest.raises(TypeError):
            shard_tensor_parallel(model)
    assert {path: set(module.__dict__) for path, module in model.named_modules()} == before
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert model(ids()).logits.shape[-1] == 131


def test_a_failure_half_way_leaves_no_trace(ranks: Ranks) -> None:
    ranks(after_a_failure)


def test_without_a_process_group() -> None:
    for wrap in (shard_tensor_parallel, shard_experts):
        model = tiny_model()
        with pytest.raises(CompatibilityError, match=r"there is no process group.*torchrun --nproc-per-node 2"):
            wrap(model)
        assert not stack_of(model)


@pytest.mark.parametrize("wrap", [shard_tensor_parallel, shard_experts])
def test_bad_options(wrap: Any) -> None:
    for degree in (0, -2, 1.5, True, "2"):
        with pytest.raises(ValueError, match="Give a number of ranks, from 1 up"):
            wrap(degree=degree)
    with pytest.raises(TypeError, match=r"mesh is 'tp', not an axis of a DeviceMesh"):
        wrap(mesh="tp")
    for mesh, said in {
        (("ep", 2), ("tp", 0)): r"mesh has \('tp', 0\). Give names and numbers of ranks",
        ("ep", "tp"): "mesh has 'ep'. Give names and numbers of ranks",
        (("dp", 2), ("pp", 2)): r"the axes of mesh are \['dp', 'pp'\]. Give each its name, and one the name '(ep|tp)'",
        (("ep", 2), ("tp", 2), ("tp", 2)): "Give each its name",
    }.items():
        with pytest.raises(ValueError, match=said):
            wrap(mesh=mesh)
    with pytest.raises(ValueError, match=r"mesh says how many ranks are along '(ep|tp)', and so does degree"):
        wrap(mesh={"ep": 2, "tp": 2}, degree=2)
    with pytest.raises(ValueError, match="dispatch is 'magic'. Use one of 'all_reduce', 'all_to_all'"):
        shard_experts(dispatch="magic")
    with pytest.raises(TypeError, match="placement is 5. Give 'contiguous', or for each layer and rank"):
        shard_experts(placement=5)
    with pytest.raises(ValueError, match="placement is 'random'. Use 'contiguous'"):
        shard_experts(placement="random")


def as_json() -> tuple[str, str]:
    stack = compose(shard_tensor_parallel(degree=2), shard_experts(degree=2, placement=[[[1, 0], [2]]]))
    assert Stack.from_json(stack.to_json()) == stack
    with pytest.raises(TypeError, match=r"DeviceMesh.* belongs to this run, and JSON cannot hold it. Give the wrapper"):
        compose(shard_experts(mesh=init_distributed(device="cpu"))).to_json()
    shape = {"ep": 2, "tp": 8}
    spread = compose(shard_tensor_parallel(mesh=shape), shard_experts(mesh=shape))
    assert Stack.from_json(spread.to_json()) == spread
    return stack.to_json(), repr(stack)


def test_stacks_as_json(ranks: Ranks) -> None:
    for text, written in ranks(as_json):
        assert json.loads(text)[0]["options"]["placement"] == [[[0, 1], [2]]]
        assert "placement=(((0, 1), (2,)),)" in written


def dies_in_a_forward() -> None:
    model = shard_tensor_parallel(tiny_model(**UNEVEN))
    if distributed.get_rank() == 1:
        model.model.layers[1].register_forward_pre_hook(lambda module, args: os._exit(3))
    model(ids())


def test_a_rank_that_dies_ends_the_others(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"Connection (closed|reset) by peer|died"):
        ranks(dies_in_a_forward)


def meetings() -> list[int]:
    """How often this rank meets the others while it applies, loads, applies again, and undoes."""
    found, real = [], agreement._meet
    stack = compose(shard_tensor_parallel(), shard_experts(), with_mxfp4_experts(), with_flash_attention())

    def counted(*args: Any) -> Any:
        found[-1] += 1
        return real(*args)

    agreement._meet = counted
    try:
        for step in (
            lambda: stack(tiny_model(**UNEVEN)),
            lambda: load(GOLDEN, shard_tensor_parallel(degree=2), shard_experts(degree=2), with_mxfp4_experts()),
        ):
            found.append(0)
            model = step()
        for step in (lambda: with_flash_attention(model), lambda: undo(model, with_flash_attention)):
            found.append(0)
            step()
    finally:
        agreement._meet = real
    return found


def test_ranks_meet_once_per_apply(ranks: Ranks) -> None:
    assert ranks(meetings) == [[1, 1, 1, 1]] * ranks.num_ranks

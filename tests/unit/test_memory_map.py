"""Weights that are mapped from their files: the same numbers, and an error when a file changes under them."""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptoss_opt import (
    CheckpointError,
    export,
    load,
    shard_tensor_parallel,
    undo,
    with_chunked_loss,
    with_flash_attention,
    with_lora,
    with_mxfp4_experts,
)
from gptoss_opt.checkpoint import Checkpoint
from gptoss_opt.checkpoint.mapped import MappedFiles
from gptoss_opt.testing import random_checkpoint
from tests.helpers import group_of_one, ids, relative


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the released format. Not to be changed."""
    return random_checkpoint(tmp_path_factory.mktemp("packed") / "tiny")


@pytest.fixture
def own(packed: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    return Path(shutil.copytree(packed, tmp_path / "own"))


def in_files(tensor: Tensor) -> bool:
    """Whether a tensor's memory is that of a mapped safetensors file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(one, 16) for one in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return line.endswith(".safetensors")
    raise AssertionError("the tensor is nowhere")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids()).logits
    return found


STACKS = {
    "nothing": (),
    "packed": (with_mxfp4_experts(),),
    "all": (with_mxfp4_experts(), with_flash_attention(), with_chunked_loss()),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", STACKS)
def test_the_same_model(packed: Path, name: str, dtype: torch.dtype) -> None:
    model = load(packed, *STACKS[name], dtype=dtype, memory_map=True)
    read = load(packed, *STACKS[name], dtype=dtype)
    assert all(torch.equal(one, model.state_dict()[key]) for key, one in read.state_dict().items())
    assert torch.equal(logits(model), logits(read))
    there = Checkpoint.open(packed).tensors
    mapped = {key for key, parameter in model.named_parameters() if in_files(parameter)}
    # What stays as it is in the files: packed experts, and what has the dtype of the model there.
    assert mapped == {key for key, p in model.named_parameters() if key in there and there[key].dtype == p.dtype}
    assert any(key.endswith("_blocks") for key in mapped) == bool(STACKS[name])
    assert not any(in_files(parameter) for parameter in read.parameters())


def test_training_changes_no_file(own: Path) -> None:
    def digest() -> list[str]:
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(own.glob("*.safetensors"))]

    before = digest()
    model = load(own, with_mxfp4_experts(), with_lora(train=("norm",)), memory_map=True).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    start = model.model.norm.weight.clone()
    for _ in range(2):
        model(ids(), labels=ids()).loss.backward()
        optimizer.step()
    assert not torch.equal(model.model.norm.weight, start)
    assert digest() == before


def overwritten(file: Path) -> None:
    with open(file, "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"x")


def replaced(file: Path) -> None:
    other = file.with_suffix(".other")
    other.write_bytes(file.read_bytes())
    other.replace(file)


def touched(file: Path) -> None:
    os.utime(file, ns=(1, 1))


@pytest.mark.parametrize("change", [overwritten, replaced, touched, Path.unlink], ids=lambda one: one.__name__)
def test_a_file_that_changes_is_an_error(own: Path, change: Callable[[Path], None]) -> None:
    model, read = load(own, with_mxfp4_experts(), memory_map=True), load(own, with_mxfp4_experts())
    expected = logits(model)
    file = sorted(own.glob("*.safetensors"))[-1]
    change(file)
    with pytest.raises(CheckpointError, match=f"{file.name}: was changed, replaced or removed"):
        model(ids())
    with pytest.raises(CheckpointError, match="memory_map"):
        model.generate(ids()[:1], max_new_tokens=2)
    assert torch.equal(logits(read), expected)


def test_copies_have_values_of_their_own(own: Path) -> None:
    model = load(own, with_mxfp4_experts(), memory_map=True)
    expected = logits(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for file in own.glob("*.safetensors"):
        file.unlink()
    for one in copies:
        assert not any(in_files(parameter) for parameter in one.parameters())
        assert torch.equal(logits(one), expected)
        one.save_pretrained(own)
        assert torch.equal(logits(load(own, with_mxfp4_experts())), expected)


@pytest.mark.parametrize("wrappers", [(), (with_mxfp4_experts(),)], ids=["plain", "packed"])
def test_it_is_not_saved_over_its_own_files(own: Path, tmp_path: Path, wrappers: Any) -> None:
    model = load(own, *wrappers, memory_map=True)
    expected = logits(model)
    with pytest.raises(ValueError, match="mapped from files there"):
        model.save_pretrained(own)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "elsewhere")
    assert torch.equal(logits(load(tmp_path / "elsewhere", *wrappers)), expected)


def test_every_way_of_writing_over_its_own_files_is_refused(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own.parent)
    model = load(own.name, with_flash_attention(), memory_map=True)
    monkeypatch.chdir(tmp_path.parent)  # the path it was loaded from leads nowhere from here
    (tmp_path / "link").symlink_to(own)
    undo(model, with_flash_attention)
    expected = logits(model)
    with group_of_one():
        sharded = load(own, shard_tensor_parallel(), memory_map=True)
        for write in (
            lambda: model.save_pretrained(own),
            lambda: model.save_pretrained(tmp_path / "link"),
            lambda: export(model, own, format="bf16"),
            lambda: sharded.save_pretrained(own),
        ):
            with pytest.raises(ValueError, match="mapped from files there"):
                write()
        assert relative(logits(sharded), expected) < 1e-2
    assert relative(logits(model), expected) < 1e-2


def test_files_in_which_nothing_lies_any_more_are_forgotten(own: Path) -> None:
    model = load(own, memory_map=True)
    model.double().to(torch.bfloat16)
    assert not any(in_files(parameter) for parameter in model.parameters())
    for file in own.glob("*.safetensors"):
        touched(file)
    assert logits(model).isfinite().all()
    model.save_pretrained(own)
    open_files = [os.path.realpath(f"/proc/self/fd/{one}") for one in os.listdir("/proc/self/fd")]
    assert not any(str(own) in file for file in open_files)


# torch's own, while tracing.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_a_compiled_model_looks_too(own: Path) -> None:
    torch._dynamo.reset()
    model = load(own, with_mxfp4_experts(), memory_map=True)
    compiled = torch.compile(model, backend="eager")
    logits(compiled)
    touched(sorted(own.glob("*.safetensors"))[0])
    with pytest.raises(CheckpointError):
        logits(compiled)


def test_a_wrapper_comes_and_goes(own: Path) -> None:
    model = load(own, with_mxfp4_experts(), memory_map=True)
    dense = undo(model, with_mxfp4_experts)
    assert torch.equal(logits(dense), logits(load(own)))
    touched(sorted(own.glob("*.safetensors"))[0])
    with pytest.raises(CheckpointError):
        dense(ids())


def test_rows_are_mapped_and_what_lies_apart_is_not(packed: Path) -> None:
    checkpoint, files = Checkpoint.open(packed), MappedFiles()
    info = next(one for key, one in checkpoint.tensors.items() if key.endswith("down_proj_blocks"))
    whole = checkpoint.read(info.key)
    parts = [range(size) for size in info.shape]
    found = files.tensor(info, [range(1, 3), *parts[1:]])
    assert found is not None
    assert torch.equal(found, whole[1:3])
    assert in_files(found)
    assert files.tensor(info, [parts[0], range(4), *parts[2:]]) is None
    assert files.tensor(info, [(0, 2), *parts[1:]]) is None
    assert files.tensor(info, [range(0), *parts[1:]]) is None


def test_where_nothing_can_be_mapped_it_is_refused(packed: Path) -> None:
    with pytest.raises(ValueError, match="the weights go to meta"):
        load(packed, device="meta", memory_map=True)

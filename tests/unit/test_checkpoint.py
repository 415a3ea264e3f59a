"""Checkpoints are read bit for bit, no more than is needed, and damaged ones are refused by file and key."""

from __future__ import annotations

import fnmatch
import io
import itertools
import json
import os
import pickle
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import GptOssForCausalLM

from gptoss_opt.checkpoint import Checkpoint, CheckpointError, TensorInfo
from gptoss_opt.checkpoint import reader as safetensors_file
from gptoss_opt.testing import random_checkpoint
from tests.helpers import GOLDEN, tiny_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files and an index. Not to be changed."""
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(tiny, tmp_path / "mine"))


@pytest.fixture
def single(folder: Path) -> Path:
    """The folder of a checkpoint in one file, of three tensors."""
    return one_file(folder, {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4).bfloat16(), "c": torch.zeros(5)})


def one_file(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    for file in folder.glob("model*"):
        file.unlink()
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def everything(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, read by the safetensors library; copied, since it maps files that tests overwrite."""
    files = sorted(folder.glob("model*.safetensors"))
    return {key: value.clone() for file in files for key, value in load_file(file).items()}


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal in shape, dtype and every bit."""
    alike = (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    bits = (x.contiguous().view(-1).view(torch.uint8) for x in (actual, expected))
    return alike and torch.equal(*bits)


def layout(checkpoint: Checkpoint) -> dict[str, tuple[Any, ...]]:
    return {key: (info.file.name, info.dtype, info.shape, info.offset) for key, info in checkpoint.tensors.items()}


def refused(path: str | os.PathLike[str], *parts: str) -> None:
    """Opening it is a CheckpointError whose message has all these parts, and ends in advice."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    assert re.search(r"[.] .*\b(download|copy|run|give|convert|correct|write|unset)\b.*[.]$", message, re.I), message


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def join(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def rewrite(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a safetensors file."""
    header, data = split(file)
    edit(header)
    file.write_bytes(join(json.dumps(header).encode(), data))


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


# What is read


def test_every_tensor_bit_for_bit(tiny: Path) -> None:
    checkpoint, expected = Checkpoint.open(tiny), everything(tiny)
    assert set(checkpoint.tensors) == set(expected)
    for key, value in expected.items():
        info, counts = checkpoint.tensors[key], []
        read = checkpoint.read(key, on_bytes=counts.append)
        assert same(read, value), key
        assert read.is_contiguous()
        assert sum(counts) == info.num_bytes == value.nbytes
    index = json.loads((tiny / INDEX).read_text())
    assert sum(info.num_bytes for info in checkpoint.tensors.values()) == index["metadata"]["total_size"]
    assert {key: info.file.name for key, info in checkpoint.tensors.items()} == index["weight_map"]
    assert not same(checkpoint.read("lm_head.weight"), expected["model.embed_tokens.weight"])


def test_tensors_are_in_the_order_of_the_files(tiny: Path) -> None:
    places = [(info.file, info.offset) for info in Checkpoint.open(tiny).tensors.values()]
    assert places == sorted(places)


def test_config_is_that_of_from_pretrained(tiny: Path) -> None:
    for path in (tiny, str(GOLDEN)):
        ours = Checkpoint.open(path).config
        theirs = GptOssForCausalLM.from_pretrained(path, dtype=torch.float32).config
        assert ours.name_or_path == theirs.name_or_path == str(path)
        ours, theirs = ours.to_dict(), theirs.to_dict()
        changed = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
        assert changed <= {"dtype", "quantization_config"}  # what loading in float32 changes
    assert Checkpoint.open(tiny).config is not Checkpoint.open(tiny).config


def test_dense_checkpoint_of_save_pretrained(tmp_path: Path) -> None:
    model = tiny_model(torch.bfloat16)
    for size, num_files in (("50GB", 1), ("100KB", 5)):
        model.save_pretrained(tmp_path / size, max_shard_size=size)
        assert len(list((tmp_path / size).glob("*.safetensors"))) >= num_files
        assert (tmp_path / size / INDEX).exists() == (num_files > 1)
        checkpoint, state = Checkpoint.open(tmp_path / size), model.state_dict()
        assert set(checkpoint.tensors) == set(state)
        assert all(same(checkpoint.read(key), value) for key, value in state.items())


def test_every_dtype(folder: Path) -> None:
    dtypes = set(safetensors_file.DTYPES.values())
    bits = torch.randint(0, 2, (2, 3, 16), dtype=torch.uint8)
    tensors = {str(dtype): bits.clone().view(dtype) for dtype in dtypes - {torch.float8_e8m0fnu}}
    checkpoint = Checkpoint.open(one_file(folder, tensors))
    for key, value in tensors.items():
        assert same(checkpoint.read(key), value)
        assert same(checkpoint.read(key, (slice(1, 2), slice(0, 3), slice(1))), value[1:, :, :1])
    # The library's torch side does not know this one.
    rewrite(folder / SINGLE, lambda header: header["torch.uint8"].update(dtype="F8_E8M0"))
    assert same(Checkpoint.open(folder).read("torch.uint8"), bits.view(torch.float8_e8m0fnu))


def test_scalars_and_nothing(folder: Path) -> None:
    tensors = {"scalar": torch.tensor(3.0), "none": torch.empty(0), "no rows": torch.empty(2, 0, 3), "x": torch.ones(2)}
    checkpoint = Checkpoint.open(one_file(folder, tensors))
    assert all(same(checkpoint.read(key), value) for key, value in tensors.items())
    counts: list[int] = []
    assert checkpoint.read("x", (slice(1, 1),), on_bytes=counts.append).shape == (0,)
    assert checkpoint.read("no rows", (slice(1), slice(None), slice(2, 1))).shape == (1, 0, 0)
    assert not counts


SHAPE = (4, 6, 5, 8)


@pytest.mark.parametrize("small", [0, 64, 2**16])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_slices_of_every_dimension(
    folder: Path, monkeypatch: pytest.MonkeyPatch, small: int, dtype: torch.dtype
) -> None:
    # Small limits send these small tensors through the ways that large ones take.
    monkeypatch.setattr(safetensors_file, "SMALL", small)
    monkeypatch.setattr(safetensors_file, "SCRATCH", max(2 * small, 1))
    value = torch.randint(0, 256, SHAPE).to(dtype)
    whole = Checkpoint.open(one_file(folder, {"before": torch.ones(3), "x": value}))
    choices = [
        (slice(None), slice(size // 2), slice(1, size - 1), slice(size - 1, size), slice(-2, None), slice(0, 99))
        for size in SHAPE
    ]
    positions = torch.arange(value.numel()).view(SHAPE)
    for num_dims in range(5):
        for index in itertools.product(*(choice[: 6 if num_dims < 4 else 4] for choice in choices[:num_dims])):
            counts: list[int] = []
            read, expected = whole.read("x", index, on_bytes=counts.append), value[index]
            assert same(read, expected), index
            assert read.is_contiguous()
            assert whole.read("x", index, out=torch.empty_like(read)).equal(expected)
            needed = expected.numel() * dtype.itemsize
            first, last = positions[index].min(), positions[index].max()
            # Never outside the first and the last byte needed.
            span = int(last - first + 1) * dtype.itemsize
            assert needed <= sum(counts) <= span, index
            if small == 0:
                assert sum(counts) == needed, index
            if small == 64:
                # A gap that is read over has fewer than 64 bytes, and so has the smallest run: at least one element.
                assert sum(counts) <= 64 * needed, index


def test_bytes_read_of_shapes_like_the_released(folder: Path) -> None:
    # A quarter of the experts' rows, and of their columns, as four ranks would read them.
    blocks = torch.randint(0, 256, (3, 1440, 24, 16), dtype=torch.uint8)
    checkpoint = Checkpoint.open(one_file(folder, {"blocks": blocks}))
    whole = slice(None)
    for index, factor in (
        ((slice(1, 2),), 1),
        ((whole, slice(360, 720)), 1),  # runs of 138 kB
        ((whole, whole, slice(6, 12)), 4),  # runs of 96 bytes in rows of 384
        ((slice(2, 3), slice(100, 200), slice(6, 12)), 4),
        ((whole, slice(100, 300), slice(0, 6)), 4),  # the gap between experts, 476 kB, is not read
    ):
        counts: list[int] = []
        read = checkpoint.read("blocks", index, on_bytes=counts.append)
        assert same(read, blocks[index])
        assert read.nbytes <= sum(counts) <= factor * read.nbytes, index
        assert max(counts) <= safetensors_file.SCRATCH


def test_contiguous_bytes_go_straight_into_the_tensor(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "SCRATCH", 0)
    checkpoint = Checkpoint.open(tiny)
    checkpoint.read("lm_head.weight", (slice(3, 7),))
    with pytest.raises(ValueError, match="range"):
        checkpoint.read("lm_head.weight", (slice(3, 7), slice(3, 7)))


def test_into_the_memory_of_a_parameter(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    key = "model.layers.0.self_attn.q_proj.weight"
    parameter = torch.nn.Parameter(torch.zeros(2, 64, 64, dtype=torch.bfloat16))
    target = parameter[1]
    assert checkpoint.read(key, out=target) is target
    assert same(parameter[1], checkpoint.read(key))
    assert not parameter[0].any()
    leaf = torch.nn.Parameter(torch.zeros(64, 8, dtype=torch.bfloat16))
    assert same(checkpoint.read(key, (slice(None), slice(3, 11)), out=leaf), checkpoint.read(key)[:, 3:11])
    with torch.device("meta"):
        assert checkpoint.read(key).device.type == "cpu"
        assert checkpoint.read(key, (slice(None), slice(3))).device.type == "cpu"


def test_out_and_index_that_do_not_fit(tiny: Path) -> None:
    checkpoint, key = Checkpoint.open(tiny), "lm_head.weight"
    for out, said in (
        (torch.empty(256, 65).bfloat16(), "out is a contiguous torch.bfloat16 tensor of shape [256, 65] on cpu."),
        (torch.empty(256, 64), "out is a contiguous torch.float32 tensor"),
        (torch.empty(64, 256).bfloat16().t(), "out is a strided torch.bfloat16"),
        (
            torch.empty(256, 64, device="meta").bfloat16(),
            "on meta. Give a contiguous torch.bfloat16 one of shape [256, 64]",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(said)) as caught:
            checkpoint.read(key, out=out)
        assert repr(key) in str(caught.value)
    with pytest.raises(ValueError, match=re.escape("3 slices for shape [256, 64]. Give one per dimension")):
        checkpoint.read(key, (slice(None),) * 3)
    for part in (slice(0, 8, 2), slice(None, None, -1), 3):
        with pytest.raises(ValueError, match=re.escape(f"dimension 1 is {part!r}. Give a slice with a step of one.")):
            checkpoint.read(key, (slice(None), part))  # type: ignore[arg-type]


def test_long_and_short_reads(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_at = safetensors_file.read_at

    def stuttering(stream: io.FileIO, target: memoryview, offset: int) -> int:
        return read_at(stream, target[:5], offset)

    checkpoint, expected = Checkpoint.open(tiny), everything(tiny)
    key, columns = "model.layers.0.self_attn.o_proj.weight", (slice(None), slice(16, 32))
    # What one thread reads at once, far below what a tensor has, and a system that gives less than it is asked for.
    for name, value in (("MAX_READ", 1000), ("read_at", stuttering)):
        monkeypatch.setattr(safetensors_file, name, value)
        counts: list[int] = []
        assert same(checkpoint.read(key, on_bytes=counts.append), expected[key])
        assert same(checkpoint.read(key, columns), expected[key][columns])
        assert (max(counts), sum(counts)) == (1000, expected[key].nbytes)


def test_a_file_that_is_replaced_while_several_threads_read_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(shutil.copytree(tiny, tmp_path / "mine"))
    key = "model.layers.0.self_attn.o_proj.weight"
    file = checkpoint.tensors[key].file
    other = tmp_path / "other"
    other.write_bytes(bytes(file.stat().st_size))

    def replace(count: int) -> None:
        if other.exists():
            os.replace(other, file)

    monkeypatch.setattr(safetensors_file, "MAX_READ", 1000)
    # What was open is read to its end.
    assert same(checkpoint.read(key, on_bytes=replace), everything(tiny)[key])
    assert not checkpoint.read(key).any()


def test_a_file_that_is_cut_while_several_threads_read_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(shutil.copytree(tiny, tmp_path / "mine"))
    key = "model.layers.0.self_attn.o_proj.weight"
    info = checkpoint.tensors[key]
    monkeypatch.setattr(safetensors_file, "MAX_READ", 1000)
    os.truncate(info.file, info.offset + 5500)
    with pytest.raises(CheckpointError, match=re.escape(f"{info}: truncated while reading: 500 bytes are missing")):
        checkpoint.read(key)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_no_file_is_left_open(folder: Path) -> None:
    def fails(count: int) -> None:
        raise OSError("mine")

    before = os.listdir("/proc/self/fd")
    checkpoint = Checkpoint.open(folder)
    checkpoint.read("lm_head.weight")
    with pytest.raises(OSError, match="mine"):
        checkpoint.read("lm_head.weight", on_bytes=fails)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_it_can_be_pickled(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    again = pickle.loads(pickle.dumps(checkpoint))
    assert layout(again) == layout(checkpoint)
    assert same(again.read("lm_head.weight"), checkpoint.read("lm_head.weight"))
    assert len(repr(checkpoint)) < 200


def test_a_key_that_is_not_there(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    with pytest.raises(CheckpointError, match=r"no tensor has the key 'lm_heads.weight'. Similar: 'lm_head.weight'"):
        checkpoint.read("lm_heads.weight")
    with pytest.raises(
        CheckpointError, match=rf"{tiny}: no tensor has the key '#'. See the keys in checkpoint.tensors"
    ):
        checkpoint.read("#")


def test_files_that_change_after_opening(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    info = checkpoint.tensors["lm_head.weight"]
    os.truncate(info.file, info.offset + info.num_bytes - 9)
    for index in ((), (slice(None), slice(8, 64))):
        with pytest.raises(CheckpointError, match="truncated while reading: 9 bytes are missing") as caught:
            checkpoint.read(info.key, index)
        assert f"{info.file}: key 'lm_head.weight'" in str(caught.value)
    checkpoint.read(info.key, (slice(0, 255),))
    info.file.unlink()
    with pytest.raises(CheckpointError, match="key 'lm_head.weight': cannot be read .*No such file.* Check that"):
        checkpoint.read(info.key)


# Which files are read


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """What from_pretrained makes of it."""
    return GptOssForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """One checkpoint in shards and another, of other weights, in one file, in the same folder."""
    tiny_model(torch.bfloat16, seed=0).save_pretrained(tmp_path / "both", max_shard_size="100KB")
    tiny_model(torch.bfloat16, seed=1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / SINGLE, tmp_path / "both" / SINGLE)
    return tmp_path / "both"


def test_the_files_that_from_pretrained_takes(both: Path) -> None:
    def matches() -> set[str]:
        checkpoint, model = Checkpoint.open(both), loaded(both)
        assert set(checkpoint.tensors) == set(model)
        assert all(same(checkpoint.read(key), value) for key, value in model.items())
        return {info.file.name for info in checkpoint.tensors.values()}

    # The single file comes before the index, and a name in the config before both.
    assert matches() == {SINGLE}
    for name, files in ((INDEX, 5), (SINGLE, 1), ("renamed.safetensors", 1)):
        edit_json(both / "config.json", lambda config, name=name: config.update(transformers_weights=name))
        if name.startswith("renamed"):
            refused(both, f"{both}: there is no renamed.safetensors; weights there are model-00001-of")
            shutil.move(both / SINGLE, both / name)
        assert len(matches()) >= files
    edit_json(both / "config.json", lambda config: config.update(transformers_weights="sub/model.safetensors"))
    refused(
        both, f"{both / 'config.json'}: key 'transformers_weights': 'sub/model.safetensors' is not a plain file name."
    )


def test_tensors_of_a_shard_that_the_index_does_not_list(folder: Path) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop("lm_head.weight"))
    assert "lm_head.weight" in Checkpoint.open(folder).tensors
    assert GptOssForCausalLM.from_pretrained(folder, dtype=torch.float32).lm_head.weight.any()


# The hub


def hub_cache(root: Path, source: Path, repo: str = "org/name") -> Path:
    """The cache that the hub client would have made of a folder: symlinks into blobs."""
    store = root / f"models--{repo.replace('/', '--')}"
    snapshot = store / "snapshots" / COMMIT
    for path in (store / "refs", store / "blobs", snapshot):
        path.mkdir(parents=True)
    (store / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(source.iterdir())):
        blob = store / "blobs" / f"{number:040x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def test_hub_name_in_the_cache_offline(cache: Path, tiny: Path) -> None:
    snapshot = hub_cache(cache, tiny)
    for revision in (None, "main", COMMIT):
        checkpoint = Checkpoint.open("org/name", revision=revision)
        assert checkpoint.folder == snapshot
        assert checkpoint.config.name_or_path == "org/name"
        assert all(same(checkpoint.read(key), value) for key, value in everything(tiny).items())
    assert layout(Checkpoint.open(snapshot)) == layout(checkpoint)

    gone = snapshot / "model-00002-of-00004.safetensors"
    gone.unlink()
    refused("org/name", f"{gone}: missing; by {INDEX} it holds")


def test_hub_name_that_is_not_there(cache: Path) -> None:
    unset = "HF_HUB_OFFLINE is set, and it is not in the cache: unset that to download it."
    refused("org/other", "org/other: there is no such folder, and the hub client found no such model (", unset)
    refused(
        "not/a/hub/name", "not/a/hub/name: there is no such folder, and", "HFValidationError", "Check the name, or give"
    )
    refused("", "there is no such folder")
    with pytest.raises(CheckpointError, match="no such model at revision 'v2' ") as caught:
        Checkpoint.open("org/other", revision="v2")
    assert caught.value.__cause__ is not None


def test_hub_error_online(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strange(Exception):
        pass

    def fails(*args: Any, **kwargs: Any) -> str:
        raise Strange("the line\nis dead.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        CheckpointError, match=r"\(Strange: the line is dead\). Check the name, or .* checkpoint.$"
    ) as caught:
        Checkpoint.open("org/name")
    assert isinstance(caught.value.__cause__, Strange)


def test_only_the_top_folder_is_downloaded(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [path.name for path in tiny.iterdir()]
    released = [
        *names,
        "README.md",
        "original/config.json",
        "original/model.safetensors",
        "metal/model.bin",
        "a/b/c.json",
    ]
    asked: list[str] = []

    def download(repo: str, *, revision: str | None, local_files_only: bool, **patterns: list[str]) -> str:
        assert (repo, revision, local_files_only) == ("openai/gpt-oss-20b", "main", False)
        asked.extend(huggingface_hub.utils.filter_repo_objects(released, **patterns))
        return str(tiny)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    Checkpoint.open("openai/gpt-oss-20b", revision="main")
    assert sorted(asked) == sorted(names)
    assert any(fnmatch.fnmatchcase(name, "*.json") for name in set(released) - set(asked)), "the filter has no work"


# What is refused


def test_paths_that_are_no_folder(folder: Path, tmp_path: Path, cache: Path) -> None:
    refused(folder / "config.json", "config.json: a file. Give the folder of the checkpoint.")
    refused(tmp_path / "missing", f"{tmp_path / 'missing'}: there is no such folder. Give the folder of a checkpoint")
    Checkpoint.open(folder)


def test_configs(folder: Path) -> None:
    config = folder / "config.json"
    good = config.read_text()
    assert Checkpoint.open(str(folder)).config.hidden_size == 64
    for text, said in (
        ("{", f"{config}: not the JSON it should hold: Expecting property name"),
        ("\xff", f"{config}: not the JSON it should hold"),
        ("[1]", f"{config}: holds a JSON list, not an object."),
        ("{}", f"{config}: model_type is None. Give a checkpoint of a gpt_oss model."),
        ('{"model_type": "llama"}', f"{config}: model_type is 'llama'. Give"),
        (good.replace('"hidden_size": 64', '"hidden_size": "64"'), f"{config}: no valid config (Strict"),
        (good.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'), "`num_hidden_layers` (3) must be equal to"),
    ):
        config.write_bytes(text.encode("latin-1"))
        refused(folder, said)
    config.unlink()
    refused(folder, f"{config}: missing; the folder holds generation_config.json, model-00001-of-00004.safetensors")
    config.write_text(good)
    Checkpoint.open(folder)


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../model.safetensors", "sub/model.safetensors", "..\\x", "..", ".", "", "x/", 3, None, ["x"]],
)
def test_index_entries_that_lead_elsewhere(folder: Path, name: object) -> None:
    Checkpoint.open(folder)
    shutil.copytree(folder, folder / "sub")
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    refused(folder, f"{folder / INDEX}: key 'lm_head.weight': {name!r} is not a plain file name.")


def test_indices(folder: Path) -> None:
    index = folder / INDEX
    good = index.read_text()
    Checkpoint.open(folder)
    for text, said in (
        (good[:-3], f"{index}: not the JSON it should hold"),
        ("null", f"{index}: holds a JSON NoneType, not an object."),
        ("{}", f"{index}: key 'weight_map' is not an object"),
        ('{"weight_map": {}}', f"{index}: key 'weight_map' is not an object"),
        ('{"weight_map": ["x"]}', f"{index}: key 'weight_map' is not an object"),
        (
            good.replace('"weight_map": {', '"weight_map": {"lm_head.weight": "x",'),
            "key 'lm_head.weight' is there twice",
        ),
        (good.replace('"weight_map": {', '"weight_map": {"x": "\\u0000",'), "missing; by"),
        (good.replace('"weight_map": {', '"weight_map": {"x": "\\ud800",'), "missing; by"),
    ):
        index.write_text(text)
        refused(folder, said)
    index.unlink()
    refused(
        folder, f"{folder}: there is no {SINGLE} and no {INDEX}; weights there are model-00001-of-00004.safetensors"
    )
    index.write_text(good)
    Checkpoint.open(folder)


def test_shards_that_do_not_hold_what_the_index_says(folder: Path) -> None:
    Checkpoint.open(folder)
    first, last = (folder / f"model-0000{number}-of-00004.safetensors" for number in (1, 4))
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"model.new": last.name}))
    refused(folder, f"{last}: key 'model.new': not in this file, where {INDEX} says it is.")
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop("model.new"))

    content = last.read_bytes()
    last.unlink()
    refused(folder, f"{last}: missing; by {INDEX} it holds 2 tensors, 'model.norm.weight' first.")
    last.mkdir()
    refused(folder, f"{last}: missing;")
    first.rename(folder / "x")
    refused(folder, f"{first}: missing (and 1 more files); by {INDEX} it holds 1 tensors, 'model.embed_tokens.weight'")
    (folder / "x").rename(first)
    last.rmdir()
    last.write_bytes(content)
    Checkpoint.open(folder)

    save_file({**load_file(last), "model.embed_tokens.weight": torch.ones(2)}, last)
    refused(folder, f"{last}: key 'model.embed_tokens.weight': also in {first.name}, and may differ there.")


def entry(key: str, **changes: Any) -> Callable[[Path], None]:
    """A damage: other values in the entry of a tensor."""
    return lambda file: rewrite(file, lambda header: header[key].update(changes))


def raw(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A damage: other bytes in the file."""
    return lambda file: file.write_bytes(edit(file.read_bytes())) and None


def head(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A damage: another text as the header, with the length it has."""

    def change(file: Path) -> None:
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        file.write_bytes(join(edit(content[8:end]), content[end:]))

    return change


def without(key: str, name: str) -> Callable[[Path], None]:
    return lambda file: rewrite(file, lambda header: header[key].pop(name))


# In the file, by offset: a and c of float32, 24 and 20 bytes, then b of bfloat16, 8 bytes.
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (raw(lambda b: b""), "0 bytes, fewer than"),
    "seven bytes": (raw(lambda b: b[:7]), "7 bytes, fewer than"),
    "lfs pointer": (raw(lambda b: b"version https://git-lfs.github.com/spec/v1\n"), "a Git LFS pointer"),
    "header beyond the file": (
        raw(lambda b: (10**6).to_bytes(8, "little") + b[8:]),
        "says it is 1000000 bytes long, but",
    ),
    "header too long": (raw(lambda b: (10**8 + 1).to_bytes(8, "little") + b[8:]), "more than the 100000000 allowed"),
    "header of 2**64": (raw(lambda b: b"\xff" * 8 + b[8:]), "more than the 100000000 allowed"),
    "no header": (raw(lambda b: bytes(8) + b[8:]), "not the JSON it should hold"),
    "only a length": (raw(lambda b: b[:8]), "bytes long, but 0 follow"),
    "not utf-8": (head(lambda h: h.replace(b"dtype", b"d\xfftype", 1)), "not the JSON it should hold: 'utf-8' codec"),
    "not json": (head(lambda h: h[:-1] + b"]"), "not the JSON it should hold"),
    "not an object": (head(lambda h: b"[" + h + b"]"), "holds a JSON list, not an object"),
    "deep": (head(lambda h: b"[" * 10**5), "not the JSON it should hold"),
    "long number": (head(lambda h: b'{"a":' + b"1" * 10**4 + b"}"), "not the JSON it should hold"),
    "key twice": (head(lambda h: h.replace(b'"b"', b'"a"')), "the key 'a' is there twice"),
    "field twice": (head(lambda h: h.replace(b'"dtype"', b'"shape"', 1)), "is there twice"),
    "entry is a list": (lambda f: rewrite(f, lambda h: h.update(a=[1])), "key 'a': described by [1]"),
    "no dtype": (without("b", "dtype"), "key 'b': the dtype is None. Convert"),
    "unknown dtype": (entry("b", dtype="F4"), "key 'b': the dtype is 'F4'. Convert the tensor to one of BOOL, U8"),
    "dtype is a list": (entry("b", dtype=["F32"]), "key 'b': the dtype is ['F32']"),
    "no shape": (without("a", "shape"), "key 'a': shape is None, not a list of counts"),
    "negative shape": (entry("a", shape=[-2, -3]), "key 'a': shape is [-2, -3], not a list of counts"),
    "float shape": (entry("a", shape=[2.0, 3]), "key 'a': shape is [2.0, 3], not a list of counts"),
    "nan shape": (entry("a", shape=[float("nan")]), "key 'a': shape is [nan], not a list of counts"),
    "bool shape": (entry("a", shape=[True, 6]), "key 'a': shape is [True, 6], not a list of counts"),
    "huge shape": (entry("a", shape=[0, 2**62, 2**62], data_offsets=[0, 0]), "key 'a': shape is [0, 4611"),
    "huge count": (entry("a", shape=[0, 2**70], data_offsets=[0, 0]), "key 'a': shape is [0, 1180"),
    "no offsets": (without("a", "data_offsets"), "key 'a': data_offsets is None"),
    "one offset": (entry("a", data_offsets=[0]), "key 'a': data_offsets is [0], not a start and an end"),
    "offsets are text": (entry("a", data_offsets=["0", "24"]), "key 'a': data_offsets is ['0', '24'], not a list"),
    "negative offset": (entry("a", data_offsets=[-24, 0]), "key 'a': data_offsets is [-24, 0], not a list of counts"),
    "inverted offsets": (entry("a", data_offsets=[24, 0]), "key 'a': data_offsets is [24, 0], not a start and an end"),
    "size and shape differ": (
        entry("a", shape=[2, 4]),
        "key 'a': data_offsets [0, 24] hold 24 bytes, but shape [2, 4] of F32 takes 32.",
    ),
    "dtype and size differ": (entry("b", dtype="F32"), "hold 8 bytes, but shape [4] of F32 takes 16."),
    "overlap": (entry("c", data_offsets=[20, 40]), "key 'c': its data_offsets overlap those of 'a'."),
    "same bytes": (entry("c", data_offsets=[0, 20]), "its data_offsets overlap those of"),
    "gap": (entry("a", data_offsets=[0, 20], shape=[5]), "key 'c': its data_offsets leave a gap after those of 'a'."),
    "gap at the start": (
        lambda f: rewrite(f, lambda h: h.pop("a")),
        "key 'c': its data_offsets leave a gap after those of",
    ),
    "out of range": (entry("b", data_offsets=[10**6, 10**6 + 8]), "key 'b': its data_offsets leave a gap"),
    "beyond the end": (
        entry("b", shape=[40], data_offsets=[44, 124]),
        "key 'b': ends beyond the end of the file, which lacks 72",
    ),
    "truncated": (raw(lambda b: b[:-11]), "key 'c': ends beyond the end of the file, which lacks 11 bytes of the"),
    "no data": (
        raw(lambda b: b[: 8 + b[0] + 256 * b[1]]),
        "key 'a': ends beyond the end of the file, which lacks 52 bytes",
    ),
    "too long": (raw(lambda b: b + b"xyz"), "3 more than its header accounts for"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files(single: Path, name: str) -> None:
    damage, said = DAMAGES[name]
    assert set(Checkpoint.open(single).tensors) == {"a", "b", "c"}
    damage(single / SINGLE)
    refused(single, f"{single / SINGLE}: ", said)


def test_headers_may_have_padding_metadata_and_any_order(single: Path) -> None:
    expected = everything(single)
    rewrite(single / SINGLE, lambda header: header.update(__metadata__={"a": "b"}))
    head(lambda h: h + b"   ")(single / SINGLE)
    rewrite(single / SINGLE, lambda header: [header.update({key: header.pop(key)}) for key in sorted(header)[::-1]])
    checkpoint = Checkpoint.open(single)
    assert list(checkpoint.tensors) == sorted(checkpoint.tensors, key=lambda key: checkpoint.tensors[key].offset)
    assert all(same(checkpoint.read(key), value) for key, value in expected.items())


def test_damage_is_found_in_any_shard_before_anything_is_read(folder: Path) -> None:
    file = folder / "model-00003-of-00004.safetensors"
    Checkpoint.open(folder)
    os.truncate(file, file.stat().st_size - 1)
    refused(folder, f"{file}: key ", "which lacks 1 bytes")


def test_random_damage_to_headers(folder: Path) -> None:
    """Each of 300 changed bytes is an error of ours, or makes a file that the safetensors library reads as we do."""
    draw = random.Random(0)
    good, outcomes = Checkpoint.open(folder), Counter[str]()
    files = sorted(folder.glob("model*.safetensors"))
    for _ in range(300):
        file = draw.choice(files)
        content = file.read_bytes()
        position = draw.randrange(8 + int.from_bytes(content[:8], "little"))
        file.write_bytes(content[:position] + bytes([draw.randrange(256)]) + content[position + 1 :])
        try:
            checkpoint = Checkpoint.open(folder)
        except CheckpointError as error:
            outcomes["refused" if str(file) in str(error) else "unnamed"] += 1
        else:
            if layout(checkpoint) == layout(good):
                outcomes["as before"] += 1
            else:
                outcomes["as safetensors"] += 1
                assert_as_safetensors(file, checkpoint)
        file.write_bytes(content)
    assert outcomes["refused"] > 250, outcomes
    assert not outcomes["unnamed"], outcomes
    assert layout(Checkpoint.open(folder)) == layout(good)


def assert_as_safetensors(file: Path, checkpoint: Checkpoint) -> None:
    ours = {info.key: info for info in checkpoint.tensors.values() if info.file == file}
    try:
        theirs = load_file(file)
    except SafetensorError:
        pytest.fail(f"safetensors refuses what we read: {ours}")
    assert set(ours) == set(theirs)
    assert all(same(checkpoint.read(key), value) for key, value in theirs.items())


def test_facts_of_a_tensor(tiny: Path) -> None:
    info = Checkpoint.open(tiny).tensors["model.layers.1.mlp.experts.down_proj_blocks"]
    assert info == TensorInfo(info.file, info.key, torch.uint8, (4, 64, 3, 16), info.offset)
    assert info.num_bytes == prod(info.shape)
    with safe_open(info.file, "pt") as file:
        expected = file.get_tensor(info.key)
    assert info.file.read_bytes()[info.offset :][: info.num_bytes] == expected.numpy().tobytes()
    assert str(info) == f"{info.file}: key {info.key!r}"

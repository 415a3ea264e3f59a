"""Random checkpoints: the format and the shapes of the released ones, written whole or not at all."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import GptOssForCausalLM

from gptoss_opt import testing
from gptoss_opt.testing import SIZES, TensorSpec, random_checkpoint, shard_specs
from tests.helpers import GOLDEN

# The model card (arXiv 2508.10925, table 1), and total_size in the released index files.
RELEASED = {"20b": (20_914_757_184, 13_761_264_768), "120b": (116_829_156_672, 65_248_815_744)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def all_specs(size: str) -> dict[str, TensorSpec]:
    shape = SIZES[size]
    return {name: spec for shard in shard_specs(shape, shape.layers) for name, spec in shard.items()}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pattern(names: set[str]) -> set[str]:
    return {re.sub(r"layers\.\d+", "layers.N", name) for name in names}


def num_weights(spec: TensorSpec) -> int:
    return {"normal": 1, "blocks": 2, "scales": 0}[spec.kind] * prod(spec.shape)


def load(folder: Path, **options: object) -> GptOssForCausalLM:
    model, info = GptOssForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("size", RELEASED)
def test_released_shapes(size: str) -> None:
    specs = all_specs(size)
    assert sum(map(num_weights, specs.values())) == RELEASED[size][0]
    assert sum(spec.num_bytes for spec in specs.values()) == RELEASED[size][1]
    experts = SIZES[size].experts
    assert specs["model.layers.23.mlp.experts.gate_up_proj_blocks"].shape == (experts, 5760, 90, 16)
    assert specs["model.layers.23.mlp.experts.gate_up_proj_scales"].shape == (experts, 5760, 90)
    assert specs["model.layers.23.mlp.experts.down_proj_blocks"].shape == (experts, 2880, 90, 16)
    assert specs["model.layers.23.self_attn.q_proj.weight"].shape == (4096, 2880)
    assert specs["model.layers.23.self_attn.k_proj.weight"].shape == (512, 2880)
    assert specs["lm_head.weight"].shape == (201088, 2880)


def test_names_and_config_are_those_of_the_golden_checkpoint(tiny: Path) -> None:
    index = json.loads((GOLDEN / "model.safetensors.index.json").read_text())
    for size in SIZES:
        assert pattern(set(all_specs(size))) == pattern(set(index["weight_map"]))
    golden, ours = (json.loads((folder / "config.json").read_text()) for folder in (GOLDEN, tiny))
    assert set(ours) == set(golden)
    for key in ("quantization_config", "rope_scaling", "rope_theta", "swiglu_limit", "rms_norm_eps"):
        assert ours[key] == golden[key], key


def test_bytes_are_what_the_headers_and_the_index_say(tiny: Path) -> None:
    index = json.loads((tiny / "model.safetensors.index.json").read_text())
    specs, found = all_specs("tiny"), {}
    for path in tiny.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                assert (tuple(tensor.shape), tensor.dtype) == (specs[name].shape, specs[name].dtype), name
                found[name] = (path.name, tensor.nbytes)
        header = int.from_bytes(path.read_bytes()[:8], "little")
        inside = sum(num_bytes for file_name, num_bytes in found.values() if file_name == path.name)
        assert path.stat().st_size == 8 + header + inside
    assert {name: file_name for name, (file_name, _) in found.items()} == index["weight_map"]
    assert sum(num_bytes for _, num_bytes in found.values()) == index["metadata"]["total_size"]


def test_transformers_loads_it_and_its_tokens_vary(tiny: Path) -> None:
    model = load(tiny)
    assert (model.config.sliding_window, model.config.num_hidden_layers) == (8, 2)
    prompts = torch.randint(256, (3, 24), generator=torch.Generator().manual_seed(0))
    new = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    for prompt in prompts:
        tokens = model.generate(prompt[None], attention_mask=torch.ones(1, 24), **new)[0, 24:]
        assert len(tokens.unique()) > 8
    logits = model(prompts).logits
    assert logits.isfinite().all()
    assert 0.5 < logits.std() < 2
    second, first = logits.sort(-1).values[..., -2:].unbind(-1)
    assert (first - second).min() > 1e-4, "too close for greedy tokens to be compared"
    # The scales make the dequantised experts as large as the other weights.
    for weight in (model.model.layers[1].mlp.experts.gate_up_proj, model.model.layers[1].self_attn.q_proj.weight):
        assert 0.5 < weight.std() * 64**0.5 < 1.5
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-1e4)
    assert (model(prompts).logits - logits).norm() > 0.01 * logits.norm(), "the sinks do not matter"


def test_a_seed_is_a_checkpoint(tiny: Path, tmp_path: Path) -> None:
    again = files(random_checkpoint(tmp_path / "again", progress=True))
    other = files(random_checkpoint(tmp_path / "other", seed=1))
    assert again == files(tiny)
    assert {name for name in other if other[name] == again[name]} == {name for name in other if name.endswith("json")}


def test_fewer_and_more_layers_share_a_prefix(tiny: Path, tmp_path: Path) -> None:
    for layers in (1, 3):
        model = load(random_checkpoint(tmp_path / str(layers), layers=layers))
        assert len(model.model.layers) == len(model.config.layer_types) == layers
        whole = load(tiny).state_dict()
        shared = {name: value for name, value in model.state_dict().items() if name in whole}
        assert len(shared) == min(len(whole), len(model.state_dict()))
        assert all(torch.equal(value, whole[name]) for name, value in shared.items())


def test_an_empty_folder_and_new_parents_will_do(tmp_path: Path) -> None:
    assert random_checkpoint(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    (tmp_path / "empty").mkdir()
    assert files(random_checkpoint(tmp_path / "empty")) == files(tmp_path / "a" / "b")


def test_a_size_may_be_given_as_a_shape(tiny: Path, tmp_path: Path) -> None:
    assert files(random_checkpoint(tmp_path / "same", SIZES["tiny"])) == files(tiny)
    model = load(random_checkpoint(tmp_path / "narrow", replace(SIZES["tiny"], layers=1, experts=2)))
    assert (model.config.num_hidden_layers, model.config.num_local_experts) == (1, 2)


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no size '7b'. Use one of 'tiny', 'small', 'medium', '20b', '120b'."):
        random_checkpoint(tmp_path / "new", "7b")
    with pytest.raises(ValueError, match="layers is 0, but a checkpoint has at least one. Leave it out for 24."):
        random_checkpoint(tmp_path / "new", "20b", layers=0)
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(FileExistsError, match="is a file. Give a folder that does not exist yet, or delete it first."):
        random_checkpoint(tmp_path / "file")
    with pytest.raises(FileExistsError, match="is a folder with something in it. Give a folder"):
        random_checkpoint(tmp_path / "full")
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "full", "mine"}


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, written = testing.save_file, []

    def fails_on_the_third(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        written.append(path)
        if len(written) == 3:
            raise OSError("no space left on device")
        save(tensors, path, metadata)

    monkeypatch.setattr(testing, "save_file", fails_on_the_third)
    with pytest.raises(OSError, match="no space left"):
        random_checkpoint(tmp_path / "new")
    assert len(written) == 3
    assert not list(tmp_path.iterdir())

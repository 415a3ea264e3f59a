"""load is from_pretrained and then the wrappers, bit for bit, but reads each byte once and straight to its place."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GptOssForCausalLM,
    GptOssForSequenceClassification,
    GptOssForTokenClassification,
    GptOssModel,
)

from benchmarks.harness import peak_memory
from gptoss_opt import (
    CheckpointError,
    CompatibilityError,
    Stack,
    compose,
    explain,
    load,
    stack_of,
    undo,
    with_fast_experts,
    with_flash_attention,
    with_mxfp4_experts,
)
from gptoss_opt.checkpoint import Checkpoint
from gptoss_opt.checkpoint import folder as checkpoint_module
from gptoss_opt.testing import random_checkpoint
from tests.helpers import ids, relative, tiny_config, tiny_model

STACKS = {
    "nothing": (),
    "flash attention": (with_flash_attention(),),
    "fast experts": (with_fast_experts(),),
    "packed": (with_mxfp4_experts(),),
    "packed, by the reference": (with_mxfp4_experts(backend="reference"),),
    "all": (with_fast_experts(), with_mxfp4_experts(), with_flash_attention()),
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the released format. Not to be changed."""
    return random_checkpoint(tmp_path_factory.mktemp("packed") / "tiny")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint in bfloat16, of weights that do not fit into MXFP4. Not to be changed."""
    model = tiny_model(torch.bfloat16)
    with torch.no_grad():
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is not None and parameter.ndim == 3:
                    parameter.normal_(std=0.2)
    folder = tmp_path_factory.mktemp("dense")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(packed, tmp_path / "mine"))


def plain(path: Path, dtype: torch.dtype) -> Any:
    """What from_pretrained gives, in eval mode."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    for parameter in model.parameters():
        # Older versions leave dequantised experts in bfloat16.
        parameter.data = parameter.data.to(dtype)
    return model


def difference(actual: nn.Module, expected: nn.Module) -> str | None:
    """The first in names, order, dtype, device, trainability or any bit of parameters and buffers, or None."""
    for kind in ("named_parameters", "named_buffers"):
        one, two = list(getattr(actual, kind)()), list(getattr(expected, kind)())
        if [name for name, _ in one] != [name for name, _ in two]:
            return f"{kind}: {[name for name, _ in one]} and {[name for name, _ in two]}"
        for (name, a), (_, b) in zip(one, two, strict=True):
            facts = [(x.shape, x.dtype, x.device, x.requires_grad, x.stride(), type(x)) for x in (a, b)]
            if facts[0] != facts[1]:
                return f"{name}: {facts[0]} and {facts[1]}"
            if not torch.equal(as_bytes(a), as_bytes(b)):
                return f"{name}: other values"
    return None


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["packed", "dense"])
@pytest.mark.parametrize("stack", STACKS)
def test_equals_from_pretrained_and_then_the_wrappers(
    stack: str, kind: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(kind)
    expected = compose(*STACKS[stack])(plain(path, dtype)) if STACKS[stack] else plain(path, dtype)
    model = load(path, *STACKS[stack], dtype=dtype)
    assert difference(model, expected) is None
    assert stack_of(model) == stack_of(expected) == compose(*STACKS[stack])
    assert type(model) is type(expected)
    for one, two in zip(explain(model).rows, explain(expected).rows, strict=True):
        assert one == two
    if STACKS[stack]:
        assert torch.equal(model(ids()).logits, expected(ids()).logits)
    else:
        # Without wrappers both compute alike, but transformers chooses how when it loads.
        assert relative(model(ids()).logits, expected(ids()).logits) < (1e-5 if dtype == torch.float32 else 0.05)
    # Negative control: one bit.
    with torch.no_grad():
        next(p for p in model.parameters() if p.dtype == dtype).view(-1).view(torch.uint8)[7] ^= 1
    assert difference(model, expected)


def test_float64_holds_the_very_values(packed: Path) -> None:
    wide, narrow = load(packed, dtype=torch.float64), load(packed, dtype=torch.bfloat16)
    for (name, a), (_, b) in zip(wide.named_parameters(), narrow.named_parameters(), strict=True):
        assert a.dtype == torch.float64
        assert torch.equal(a, b.double()), name


def test_every_parameter_is_filled_however_small(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As many elements as an element has bytes, or one: what "has no memory yet" must not be confused by.
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        model = load(packed, dtype=dtype)
        expected = {key: Checkpoint.open(packed).read(key) for key in Checkpoint.open(packed).tensors}
        for name, parameter in model.named_parameters():
            assert parameter.untyped_storage().nbytes() >= parameter.numel() * parameter.element_size(), name
            if name in expected:
                assert torch.equal(parameter, expected[name].to(dtype)), name


def test_the_model_is_whole(packed: Path) -> None:
    model, expected = load(packed, with_mxfp4_experts()), plain(packed, torch.bfloat16)
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert model.name_or_path == str(packed)
    assert model.config.name_or_path == str(packed)
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert model.generation_config.pad_token_id == 254
    assert model.dtype == torch.bfloat16
    assert model.config.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    # What is computed and not read: in float32, whatever the dtype, and not from the meta device.
    for (name, a), (_, b) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert a.dtype == b.dtype == torch.float32, name
        assert torch.equal(a, b), name
        assert a.abs().sum() > 0
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert len(frozen) == 2 * 4
    assert all(name.endswith(("_blocks", "_scales")) for name in frozen)
    assert model.generate(ids(1, 5), max_new_tokens=3, do_sample=False).shape == (1, 8)


def test_undo_of_what_was_loaded_packed(packed: Path) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        model = undo(load(packed, with_mxfp4_experts(), dtype=dtype))
        expected = load(packed, dtype=dtype)
        # Packed weights are frozen from the start on, but the dense ones that come of them train.
        assert difference(model, expected) is None
        assert getattr(model.config, "quantization_config", None) is None


def test_arguments(packed: Path) -> None:
    stack = compose(with_mxfp4_experts(), with_flash_attention())
    logits = load(packed, stack)(ids()).logits
    for wrappers in ((with_flash_attention(), with_mxfp4_experts()), (Stack.from_json(stack.to_json()),)):
        assert torch.equal(load(str(packed), *wrappers, device="cpu")(ids()).logits, logits)
    assert load(packed).dtype == torch.bfloat16
    for dtype in (torch.float16, torch.int8):
        with pytest.raises(ValueError, match=f"load: dtype is {dtype}. Use one of torch.bfloat16, .*float16 overflows"):
            load(packed, dtype=dtype)
    with pytest.raises(TypeError, match=r"compose takes wrappers.*Write with_mxfp4_experts\(\)"):
        load(packed, with_mxfp4_experts)


def reads(monkeypatch: pytest.MonkeyPatch) -> tuple[Counter, Counter]:
    """How often each tensor is read from now on, and how many bytes come."""
    times: Counter = Counter()
    volume: Counter = Counter()
    read = Checkpoint.read

    def counted(self: Checkpoint, key: str, *args: Any, on_bytes: Any = None, **rest: Any) -> Tensor:
        times[key] += 1

        def also(number: int) -> None:
            volume[key] += number
            if on_bytes is not None:
                on_bytes(number)

        return read(self, key, *args, on_bytes=also, **rest)

    monkeypatch.setattr(checkpoint_module.Checkpoint, "read", counted)
    return times, volume


def test_devices(packed: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no tensor can be made on the device 'cuda'.*Use another"):
            load(packed, device="cuda")
    with pytest.raises(ValueError, match="on the device 'nonsense'"):
        load(packed, device="nonsense")
    with torch.device("meta"):
        model = load(packed, with_mxfp4_experts())
    assert difference(model, load(packed, with_mxfp4_experts())) is None


@pytest.mark.parametrize("stack", ["nothing", "all"])
@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_each_byte_is_read_once(
    kind: str, stack: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = request.getfixturevalue(kind)
    _, volume = reads(monkeypatch)
    load(path, *STACKS[stack])
    tensors = Checkpoint.open(path).tensors
    assert volume == {key: info.num_bytes for key, info in tensors.items()}


def test_what_stays_packed_is_never_unpacked(packed: Path, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptoss_opt.layout import mxfp4 as experts

    calls: list[str] = []
    unpack = experts.unpack
    monkeypatch.setattr(experts, "unpack", lambda *args: calls.append("unpacked") or unpack(*args))
    load(packed, with_mxfp4_experts())
    assert not calls
    # Negative control.
    load(packed)
    assert calls


def test_conflicts_come_before_anything_is_read(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times, _ = reads(monkeypatch)
    for stack, message in (
        ((with_mxfp4_experts(), with_mxfp4_experts(backend="reference")), "the same wrapper twice"),
        ((with_mxfp4_experts(backend="triton"),), "backend 'triton' cannot serve here: needs CUDA"),
        ((with_flash_attention(backend="fa2"),), "backend 'fa2' cannot serve here"),
    ):
        with pytest.raises(CompatibilityError, match=message):
            load(packed, *stack)
    assert not times


def test_sizes_that_cannot_be_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GptOssForCausalLM(tiny_config(intermediate_size=48)).bfloat16().save_pretrained(tmp_path)
    times, _ = reads(monkeypatch)
    with pytest.raises(CompatibilityError, match="intermediate_size is 48, and MXFP4 packs rows of a multiple of 32"):
        load(tmp_path, with_mxfp4_experts())
    assert not times
    assert load(tmp_path)(ids()).logits.isfinite().all()


# Bad input


def edit_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of the file of layer 0, and list them again in the index."""
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    name = weight_map["model.layers.0.input_layernorm.weight"]
    tensors = {key: value.clone() for key, value in load_file(folder / name).items()}
    change(tensors)
    (folder / name).unlink()
    save_file(tensors, folder / name, metadata={"format": "pt"})
    weight_map = {key: file for key, file in weight_map.items() if file != name} | dict.fromkeys(tensors, name)
    edit_json(index, weight_map=weight_map)


LAYER = "model.layers.0."
EXPERTS = f"{LAYER}mlp.experts."


def replaced(key: str, new: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.__setitem__(key, new(tensors[key]).contiguous())


BAD_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], tuple[str, ...]]] = {
    "a missing weight": (
        lambda tensors: tensors.pop(f"{LAYER}self_attn.sinks"),
        ("there is no tensor 'model.layers.0.self_attn.sinks'", "config.json needs it"),
    ),
    "missing scales": (
        lambda tensors: tensors.pop(f"{EXPERTS}down_proj_scales"),
        (f"there is no tensor '{EXPERTS}down_proj_scales'",),
    ),
    "missing blocks": (
        lambda tensors: tensors.pop(f"{EXPERTS}down_proj_blocks"),
        (f"there is no tensor '{EXPERTS}down_proj",),
    ),
    "a wrong shape": (
        replaced(f"{LAYER}self_attn.sinks", lambda x: x[:3]),
        ("self_attn.sinks", "has the shape [3]", "config.json needs [4]"),
    ),
    "too few experts": (
        replaced(f"{EXPERTS}gate_up_proj_blocks", lambda x: x[:3]),
        ("gate_up_proj_blocks", "has the shape [3, 192, 2, 16]", "needs [4, 192, 2, 16]"),
    ),
    "blocks and scales exchanged in order": (
        replaced(f"{EXPERTS}gate_up_proj_scales", lambda x: x.mT),
        ("gate_up_proj_scales", "has the shape [4, 2, 192]", "needs [4, 192, 2]"),
    ),
    "blocks of another dtype": (
        replaced(f"{EXPERTS}gate_up_proj_blocks", lambda x: x.bfloat16()),
        ("gate_up_proj_blocks", "is torch.bfloat16, and should be uint8"),
    ),
    "weights of another dtype": (
        replaced(f"{LAYER}self_attn.q_proj.weight", lambda x: x.to(torch.uint8)),
        ("q_proj.weight", "is torch.uint8, and should be floating point"),
    ),
}


@pytest.mark.parametrize("stack", ["nothing", "packed"])
@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_bad_tensors_are_refused_before_any_is_read(
    kind: str, stack: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, parts = BAD_TENSORS[kind]
    edit_tensors(folder, change)
    times, _ = reads(monkeypatch)
    with pytest.raises(CheckpointError) as caught:
        load(folder, *STACKS[stack])
    message = str(caught.value)
    assert str(folder) in message
    for part in parts:
        assert part in message, message
    assert not times


def test_missing_and_cut_files(folder: Path) -> None:
    shard = folder / "model-00002-of-00004.safetensors"
    whole = shard.read_bytes()
    for cut in (0, 100, len(whole) - 1):
        shard.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="model-00002-of-00004.safetensors"):
            load(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00004.safetensors: missing"):
        load(folder, with_mxfp4_experts())
    with pytest.raises(CheckpointError, match="there is no such folder"):
        load(folder / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'. Give a checkpoint of a gpt_oss model"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "names the method 'bitsandbytes', and load reads"),
        ({"quantization_config": {"quant_method": "fp8"}}, "names the method 'fp8'"),
        ({"quantization_config": {}}, "names the method None"),
        ({"num_local_experts": 5}, r"has the shape \[4\b"),
        ({"num_hidden_layers": 3}, "there is no tensor 'model.layers.2"),
        ({"hidden_size": 96}, "has the shape"),
    ],
)
@pytest.mark.parametrize("stack", ["nothing", "packed"])
def test_bad_configs(changes: dict, message: str, stack: str, folder: Path) -> None:
    if "num_hidden_layers" in changes:
        changes = {**changes, "layer_types": ["full_attention"] * 3}
    edit_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder, *STACKS[stack])


def test_packed_weights_without_a_quantization_config(folder: Path, packed: Path) -> None:
    # The names of the tensors tell.
    config = folder / "config.json"
    content = json.loads(config.read_text())
    del content["quantization_config"]
    config.write_text(json.dumps(content))
    for stack in ((), (with_mxfp4_experts(),)):
        assert difference(load(folder, *stack), load(packed, *stack)) is None


def test_tensors_without_a_place_are_told_of(folder: Path, packed: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update(extra=torch.zeros(3), more=torch.ones(2)))
    with pytest.warns(
        UserWarning, match="holds 2 tensors that the model has no place for, such as extra, more"
    ) as found:
        model = load(folder)
    # The warning points at the call.
    assert [Path(warning.filename).name for warning in found] == [Path(__file__).name]
    assert difference(model, load(packed)) is None


def test_weights_that_are_not_finite_cannot_be_packed(tmp_path: Path) -> None:
    model = tiny_model(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3, 4] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="an infinity or a NaN"):
        load(tmp_path, with_mxfp4_experts())
    assert load(tmp_path).model.layers[1].mlp.experts.down_proj.isnan().sum() == 1


def test_tied_embeddings(tmp_path: Path) -> None:
    expected = tiny_model(torch.bfloat16, tie_word_embeddings=True)
    expected.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight)


def test_the_checkpoint_is_left_alone(folder: Path, packed: Path) -> None:
    model = load(folder, with_mxfp4_experts())
    shutil.rmtree(folder)
    # Nothing is mapped: the files may go, and the weights may be written to.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert difference(load(packed), load(packed)) is None


def test_copies_and_threads_of_what_was_loaded(packed: Path) -> None:
    model = load(packed, with_mxfp4_experts())
    twin = copy.deepcopy(model)
    assert difference(twin, model) is None
    assert torch.equal(twin(ids()).logits, model(ids()).logits)


def loading(folder: str, tiny: str) -> Callable[[], object]:
    # What is allocated once, on first use.
    load(tiny, with_mxfp4_experts())
    return lambda: load(folder, with_mxfp4_experts())


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_memory_above_the_model_is_a_tensor(kind: str, packed: Path, tmp_path: Path) -> None:
    large = random_checkpoint(tmp_path / "large", "small", layers=12)
    if kind == "dense":
        load(large).save_pretrained(tmp_path / "dense")
        large = tmp_path / "dense"
    size = sum(p.numel() * p.element_size() for p in load(large, with_mxfp4_experts()).parameters())
    allowed = max(info.num_bytes for info in Checkpoint.open(large).tensors.values()) + 12 * 2**20
    peak = peak_memory(loading, str(large), str(packed))
    assert 0.9 * size < peak < size + allowed, (peak, size, allowed)
    # Negative control: that is far from a second model, and from a dense one.
    assert allowed < size / 3


def test_dtypes_by_name(packed: Path, dense: Path, folder: Path) -> None:
    for name, dtype in (("bfloat16", torch.bfloat16), ("torch.float32", torch.float32), ("float64", torch.float64)):
        assert difference(load(packed, dtype=name), load(packed, dtype=dtype)) is None
    # "auto" is what config.json says, else what the weights are.
    edit_json(folder / "config.json", dtype="float32")
    assert load(folder, dtype="auto").dtype == torch.float32
    assert load(packed, dtype="auto").dtype == load(dense, dtype="auto").dtype == torch.bfloat16
    for wrong in ("float16", "flaot32", "Tensor", torch.int8):
        with pytest.raises(ValueError, match=f"load: dtype is {wrong}. Use one of"):
            load(packed, dtype=wrong)
    edit_json(folder / "config.json", dtype="float16")
    with pytest.raises(CheckpointError, match="its weights are (torch.)?float16. Give load a dtype"):
        load(folder, dtype="auto")


@pytest.mark.parametrize("kind", [GptOssModel, GptOssForSequenceClassification, GptOssForTokenClassification])
def test_other_heads(kind: Any, tmp_path: Path) -> None:
    saved = tiny_model(kind=kind)
    for name, wrap in (("dense", None), ("packed", with_mxfp4_experts)):
        (wrap(saved) if wrap else saved).save_pretrained(tmp_path / name)
        for stack in ((), (with_flash_attention(), with_mxfp4_experts())):
            model = load(tmp_path / name, *stack, dtype=torch.float32)
            assert type(model) is kind
            found, wanted = model(ids(2, 9))[0], saved(ids(2, 9))[0]
            assert relative(found, wanted) < 1e-5
    edit_json(tmp_path / "dense" / "config.json", architectures=["LlamaForCausalLM"])
    with pytest.raises(CheckpointError, match="architectures names 'LlamaForCausalLM', which is no GPT-OSS model"):
        load(tmp_path / "dense")

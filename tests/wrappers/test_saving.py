"""A wrapped model saves what plain transformers and `load` read, and its config makes a plain model."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssForCausalLM, GptOssModel

from gptoss_opt import (
    CompatibilityError,
    compose,
    load,
    stack_of,
    undo,
    with_fast_experts,
    with_flash_attention,
    with_mxfp4_experts,
)
from gptoss_opt.extend import GPT_OSS, STORAGES, Attachment, Layout, Phase, Report, Storage, Stored, Wrapper
from gptoss_opt.testing import random_checkpoint
from tests.helpers import ids, relative, tiny_model

WRAP: dict[str, Callable[[Any], Any]] = {
    "flash": with_flash_attention,
    "fast": with_fast_experts,
    "packed": with_mxfp4_experts,
    "all": compose(with_flash_attention(), with_fast_experts(), with_mxfp4_experts()),
}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("released"), "tiny")


def dequantised(path: Path) -> Any:
    """As transformers loads a packed checkpoint where it has no kernels for it."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for parameter in model.parameters():
        # Older versions leave the experts in bfloat16.
        parameter.data = parameter.data.float()
    return model


def dense(path: Path) -> Any:
    return load(path, dtype=torch.float32)


def from_its_config(path: Path) -> Any:
    """A dense model whose config says that it is packed, as that of the released checkpoint does."""
    model = dequantised(path)
    model.config.quantization_config = {"quant_method": "mxfp4"}
    return model


def logits_of(path: Path) -> list[Tensor]:
    models = dequantised(path), load(path, dtype=torch.float32)
    return [model(ids(1, 9)).logits for model in models]


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "100KB"}], ids=["one file", "several"])
@pytest.mark.parametrize("make", [dequantised, dense, from_its_config])
@pytest.mark.parametrize("wrap", WRAP.values(), ids=WRAP)
def test_what_is_saved_is_read_back(
    wrap: Callable[[Any], Any], make: Callable[[Path], Any], shards: dict[str, str], released: Path, tmp_path: Path
) -> None:
    expected = dequantised(released)(ids(1, 9)).logits
    if make is from_its_config and wrap in (WRAP["packed"], WRAP["all"]):
        with pytest.raises(CompatibilityError, match="says that the model is quantised already"):
            wrap(make(released))
        return
    model = wrap(make(released))
    model.save_pretrained(tmp_path, **shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(shards)
    for logits in logits_of(tmp_path):
        assert relative(logits, expected) < 1e-6
    # The model goes on as it was.
    assert relative(model(ids(1, 9)).logits, expected) < 1e-5
    assert not stack_of(undo(model))
    assert "save_pretrained" not in vars(model)


def test_a_model_without_a_name_saves_itself(tmp_path: Path) -> None:
    with_mxfp4_experts(tiny_model()).save_pretrained(tmp_path)
    assert relative(logits_of(tmp_path)[0], tiny_model()(ids(1, 9)).logits) < 1e-5
    assert with_mxfp4_experts(tiny_model()).num_parameters() == tiny_model().num_parameters()
    assert not any(p.requires_grad for p in with_mxfp4_experts(tiny_model()).requires_grad_(False).parameters())


def test_without_a_wrapper_transformers_loses_the_experts_of_what_it_dequantised(
    released: Path, tmp_path: Path
) -> None:
    """The negative control: what the wrappers mend."""
    model = dequantised(released)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert relative(again(ids(1, 9)).logits, model(ids(1, 9)).logits) > 1e-2


@pytest.mark.parametrize("wrap", WRAP.values(), ids=WRAP)
def test_copies_pickles_and_parts_save_themselves(wrap: Callable[[Any], Any], released: Path, tmp_path: Path) -> None:
    model = wrap(dequantised(released))
    expected = model(ids(1, 9)).logits
    model.model.save_pretrained(tmp_path / "part")
    part = GptOssModel.from_pretrained(tmp_path / "part", dtype=torch.float32).float()
    assert relative(model.lm_head(part(ids(1, 9)).last_hidden_state), expected) < 1e-5
    copied, dropped = copy.deepcopy(model), weakref.ref(model)
    del model
    gc.collect()
    assert dropped() is None, "saving keeps the model alive"
    for name, other in {"copied": copied, "pickled": pickle.loads(pickle.dumps(copied))}.items():
        with torch.no_grad():
            other.model.norm.weight.mul_(2)
        expected = other(ids(1, 9)).logits
        other.save_pretrained(tmp_path / name)
        for logits in logits_of(tmp_path / name):
            assert relative(logits, expected) < 1e-5


class Halves(Storage):
    """Holds half of each value."""

    name = "halves"
    suffixes = ("_half",)

    def encode(self, dense: Any) -> Stored:
        return Stored({"_half": dense / 2})

    def decode(self, tensors: Any, dtype: torch.dtype) -> Tensor:
        return (tensors["_half"] * 2).to(dtype)


class HalvedNorm(Wrapper):
    name: ClassVar[str] = "with_toy_halved_norm"
    phase: ClassVar[Phase] = Phase.LAYOUT
    host: ClassVar = GPT_OSS

    def layout(self, model: Any, layout: Layout) -> Layout:
        return layout.store(["model.norm.weight"], Halves.name)

    def attach(self, model: Any, journal: Attachment) -> Report:
        journal.around(model, "model.norm", _norm, None)
        return Report(("halved",))


def _norm(data: None, module: Any, inner: Any, x: Tensor) -> Tensor:
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return 2 * module.weight_half * x


def test_a_storage_of_ones_own_is_saved_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STORAGES, Halves.name, Halves())
    expected = tiny_model()(ids(1, 9)).logits
    model = HalvedNorm()(tiny_model())
    assert "model.norm.weight_half" in model.state_dict()
    model.save_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    for folder in ("own", "given"):
        for logits in logits_of(tmp_path / folder):
            assert relative(logits, expected) < 1e-5
    assert "model.norm.weight_half" in model.state_dict()


@pytest.mark.parametrize("make", [AutoModelForCausalLM.from_config, GptOssForCausalLM])
@pytest.mark.parametrize("wrap", WRAP.values(), ids=WRAP)
def test_a_model_of_a_wrapped_models_config_is_plain(wrap: Callable[[Any], Any], make: Callable[[Any], Any]) -> None:
    plain = tiny_model()
    model = make(wrap(tiny_model()).config)
    model.load_state_dict(plain.state_dict())
    model.eval()
    mask = torch.ones_like(ids())
    mask[0, :4] = 0
    for given in ({}, {"attention_mask": mask}):
        assert relative(model(ids(), **given).logits, plain(ids(), **given).logits) < 1e-6
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids(), **options), plain.generate(ids(), **options))
    assert not stack_of(model)
    # It can be wrapped, and be plain again.
    assert relative(undo(with_mxfp4_experts(model))(ids()).logits, plain(ids()).logits) < 1e-6

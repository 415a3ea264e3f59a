"""Adapters merged and exported on several ranks: the same as by one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed

from gptoss_opt import (
    compose,
    export,
    gather_state_dict,
    merge_lora,
    shard_experts,
    shard_tensor_parallel,
    with_lora,
    with_mxfp4_experts,
)
from gptoss_opt.distributed import local_part
from tests.distributed.models import UNEVEN
from tests.distributed.ranks import Ranks
from tests.helpers import relative, tiny_model

TARGETS = ("q_proj", "o_proj", "router", "gate_up_proj", "down_proj", "lm_head")
WRAPS: dict[str, Callable[[], Any]] = {
    "tensor parallel": lambda: compose(shard_tensor_parallel(degree=2)),
    "experts": lambda: compose(shard_experts()),
    "both": lambda: compose(shard_tensor_parallel(degree=2), shard_experts(degree=2)),
    "both, packed": lambda: compose(shard_tensor_parallel(degree=2), shard_experts(degree=2), with_mxfp4_experts()),
    "tensor parallel, packed": lambda: compose(shard_tensor_parallel(degree=2), with_mxfp4_experts()),
}


def adapted(stack: Any = None) -> Any:
    """A model with adapters whose second factors are not zero, the same on one rank and on several."""
    model = with_lora(tiny_model(**UNEVEN), rank=4, targets=TARGETS)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.5)
    return stack(model) if stack is not None else model


def merged(name: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    model = adapted(WRAPS[name]())
    report = merge_lora(model, lossy=True)
    tensors = {key: tensor.clone() for key, tensor in gather_state_dict(model) if tensor is not None}
    return tensors, {weight: found.sqnr for weight, found in report.weights.items()}


@pytest.mark.parametrize("name", WRAPS)
def test_merges_what_one_process_merges(ranks: Ranks, name: str) -> None:
    alone = adapted(with_mxfp4_experts()) if "packed" in name else adapted()
    before = alone.state_dict()["lm_head.weight"].clone()
    sqnr = {weight: found.sqnr for weight, found in merge_lora(alone, lossy=True).weights.items()}
    expected = alone.state_dict()
    found = ranks(merged, name)
    assert all(reported == found[0][1] for _, reported in found), "ranks report otherwise"
    tensors, reported = found[0]
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        if tensor.dtype == torch.uint8:
            assert (tensor == expected[key]).double().mean() > 0.999, key  # sums of another order round otherwise
        else:
            assert relative(tensor, expected[key]) < 1e-6, key
    assert reported.keys() == sqnr.keys()
    assert all(reported[weight] == pytest.approx(sqnr[weight], rel=1e-2) for weight in sqnr if "experts" in weight)
    assert relative(tensors["lm_head.weight"], before) > 0.1, "the adapters change nothing"


def exported(folder: Path, name: str, format: str) -> None:
    model = adapted(WRAPS[name]())
    held = {key: local_part(p).clone() for key, p in model.named_parameters()}
    export(model, folder, format=format, lossy=True)
    # All ranks come back when it is written, and the model is as it was.
    assert (folder / "config.json").exists()
    assert all(torch.equal(local_part(p), held[key]) for key, p in model.named_parameters())


@pytest.mark.parametrize(("name", "format"), [("both", "bf16"), ("both", "mxfp4"), ("both, packed", "mxfp4")])
def test_exports_what_one_process_exports(ranks: Ranks, tmp_path: Path, name: str, format: str) -> None:
    ranks(exported, tmp_path / "ours", name, format)
    alone = adapted(with_mxfp4_experts()) if "packed" in name else adapted()
    export(alone, tmp_path / "alone", format=format, lossy=True)
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "alone"))
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[key].dtype, other[key].shape)
        assert (tensor == other[key]).double().mean() > 0.99, key
    configs = [(tmp_path / folder / "config.json").read_text() for folder in ("ours", "alone")]
    assert configs[0] == configs[1]


def refused() -> str:
    model = adapted(WRAPS["both, packed"]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                local_part(parameter).mul_(1e-3)
    with pytest.raises(ValueError, match="would round away") as error:
        merge_lora(model)
    assert distributed.is_initialized()
    return str(error.value)


def test_what_would_be_lost_is_refused_on_all_ranks_alike(ranks: Ranks) -> None:
    first, *others = ranks(refused)
    assert all(other == first for other in others)

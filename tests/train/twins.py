"""Models to train and to compare with: a tiny one with adapters, and the same on plain transformers by peft."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from gptoss_opt import save_adapter, undo, with_lora
from gptoss_opt.wrappers.lora import TARGETS
from tests.helpers import tiny_model


def plain(dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Plain transformers; in float64 no curve parts from another by rounding."""
    model = tiny_model(dtype, **changes)
    model.set_experts_implementation("eager")
    return model


def begun(model: Any) -> Any:
    """A model whose adapters are not where they began: B is not zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(model: Any = None, **options: Any) -> Any:
    """A model with adapters on attention, router and experts."""
    model = plain() if model is None else model
    options = {"rank": 4, "targets": (*TARGETS, "router"), "dtype": model.dtype, **options}
    return begun(with_lora(model, **options))


def in_peft(model: Any, folder: Path, base: Any = None) -> Any:
    """The same adapters, as peft has them on a plain model."""
    save_adapter(model, folder)
    return PeftModel.from_pretrained(plain() if base is None else base, folder, is_trainable=True)


def without_adapters(model: Any) -> Any:
    """A model with the same parameters and no adapters."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return undo(copy.deepcopy(model, shared), with_lora, discard=True).requires_grad_(False)


def values(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter, by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_only_adapters_changed(model: nn.Module, before: dict[str, Tensor]) -> None:
    """All adapters are elsewhere than before, and nothing else is, bit for bit."""
    now = values(model)
    assert now.keys() == before.keys()
    changed = {name for name in now if not torch.equal(now[name], before[name])}
    assert changed == {name for name in now if "lora_" in name}

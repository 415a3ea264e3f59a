"""Saving a model that wrappers are on, as it is held: a checkpoint that plain transformers and `load` read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core import held_by
from ..core.journal import Journal, SetAttribute, resolve_path
from ..core.record import record_of
from ..layout import DENSE, MXFP4, STORAGES, Held

SAVING = "saving"
"""A slot of a model: see `Wrapper`."""

MAPPED = "_gptoss_opt_mapped_files"
"""An attribute of a model whose weights are mapped from files: a mapping from their paths."""

QUANTIZATION_CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
"""What the released checkpoints say of their weights in config.json."""


def save_pretrained(
    model: Any, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, **options: Any
) -> Any:
    """transformers' `save_pretrained` of a model that one process holds, with the same options.

    Packed experts are written as in the released checkpoints, what a wrapper stores in a way of its own is written
    dense, and all else as it is, under its own name, whatever transformers did to it when it loaded the model.
    """
    refuse_mapped(model, save_directory)
    journal, odd = Journal(), _stored_otherwise(model)
    if odd:
        state_dict = _dense(odd, model.state_dict() if state_dict is None else state_dict)
    try:
        journal.set(model, "", "config", config_to_save(model))
        # What from_pretrained did to the weights on loading, and save_pretrained would do the other way round.
        journal.set(model, "", "_weight_conversions", [])
        return type(model).save_pretrained(model, save_directory, is_main_process, state_dict, **options)
    finally:
        journal.undo(model)


def refuse_mapped(model: nn.Module, save_directory: Any) -> None:
    """Raise `ValueError` if a model is to be written over the very files that its weights are mapped from."""
    folders = {file.parent.resolve() for file in model.__dict__.get(MAPPED, ())}
    if Path(save_directory).resolve() in folders:
        raise ValueError(
            f"{str(save_directory)!r}: the weights are mapped from files there (memory_map=True), "
            "which writing would change under them. Save to another folder, or load without memory_map."
        )


def config_to_save(model: Any, *, packed: bool | None = None) -> Any:
    """A copy of the config of a model, or of a part of one, that says how its experts are stored, or will be.

    What wrappers have set there for training or computing is not in it, unless the user has changed it since.
    """
    config = copy.deepcopy(model.config)
    for applied in reversed(record_of(model).applied):
        for edit in reversed(applied.edits):
            on_config = isinstance(edit, SetAttribute) and edit.path.rpartition(".")[2] == "config"
            if on_config and resolve_path(model, edit.path) is model.config and edit.intact(model):
                replace(edit, path="").undo(config)
    quantised = getattr(config, "quantization_config", None)
    quantised = quantised if isinstance(quantised, dict) or quantised is None else quantised.to_dict()
    if packed is None:
        packed = any(name.endswith(MXFP4.suffixes) for name, _ in model.named_parameters())
    if packed:
        config.quantization_config = copy.deepcopy(QUANTIZATION_CONFIG)
    elif quantised and quantised.get("quant_method") == QUANTIZATION_CONFIG["quant_method"]:
        del config.quantization_config
    return config


def _stored_otherwise(model: nn.Module) -> dict[str, Held]:
    """The parameters that a wrapper stores in a way of its own, which no reader of checkpoints knows."""
    return {name: how for name, how in held_by(model).items() if how.form.storage not in (DENSE.name, MXFP4.name)}


def _dense(stored: Mapping[str, Held], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which these parameters are dense."""
    dense = dict(state_dict)
    for name, how in stored.items():
        storage = STORAGES[how.form.storage]
        tensors = {suffix: dense.pop(name + suffix) for suffix in storage.suffixes}
        dense[name] = storage.decode(tensors, how.form.dtype)
    return dense

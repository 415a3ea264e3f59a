"""A whole checkpoint from a model and its adapters, which others load."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.adapter import save_adapter
from ..checkpoint.save import write_checkpoint, write_on_first
from ..core import layout_of, mesh_of, stack_of
from ..core.record import wrapped_model
from ..core.resolve import layout_for
from ..layout import DENSE, MXFP4, STORAGES, Layout
from ..model.adapters import adapters_on
from ..model.experts import expert_parameters
from ..model.saving import config_to_save
from .fold import Change, Folded, changes_of, refuse_fsdp
from .merge import MergeReport, refuse_loss, tried

FORMATS = {"mxfp4": MXFP4.name, "bf16": DENSE.name}
"""The storage of the experts' weights, by format."""
ADAPTERS = ("merged", "apart")
APART = "adapter"
"""The folder of the adapter, in that of the checkpoint."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@torch.no_grad()
def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: str = "mxfp4",
    adapter: str = "merged",
    lossy: bool = False,
) -> MergeReport:
    """Write a whole checkpoint that plain transformers loads, with the adapters merged or beside it.

    Names, shapes and dtypes are those of the released files: experts as MXFP4 blocks and scales, or dense, and all else
    in bfloat16. The model stays as it is. One tensor is made and written at a time; where several ranks hold the model,
    each must call it, and rank 0 writes one folder. Files of the tokenizer are copied from where the model came from.

    Args:
        model: a GPT-OSS model, with wrappers or without.
        path: the folder; it is made where it does not exist.
        format: "mxfp4" as released, which vLLM and llama.cpp's converter read; or "bf16".
        adapter: "merged" into the weights, or "apart", as a peft adapter in the folder `adapter` of the checkpoint.
        lossy: merge even where less than half of a change's energy arrives.

    Returns:
        How exact the merged weights are; empty if none are merged.

    Raises:
        ValueError: there is no such format, the sizes do not fit it, or changes would be lost, with the numbers.
        OSError: it could not be written; on all ranks.

    Example:
        >>> report = export(with_lora(model), folder, format="bf16")
        >>> type(AutoModelForCausalLM.from_pretrained(folder)).__name__
        'GptOssForCausalLM'
    """
    for option, value, known in (("format", format, FORMATS), ("adapter", adapter, ADAPTERS)):
        if value not in known:
            raise ValueError(f"export: {option} is {value!r}. Use one of {', '.join(map(repr, known))}.")
    inner: Any = wrapped_model(model)
    refuse_fsdp(inner)
    changes = changes_of(inner)
    if adapter == "apart":
        adapters_on(inner)
    layout = layout_of(inner) if stack_of(inner) else layout_for((), inner, to_move=False)
    storages = {name: DENSE.name for name in layout if name not in layout.new}
    storages |= dict.fromkeys(expert_parameters(inner), FORMATS[format])
    for name, storage in storages.items():
        if reason := STORAGES[storage].why_not(layout.form(name).shape):
            raise ValueError(f"export: {name} cannot be written as {format!r}: {reason} Use format='bf16'.")
    merged = changes if adapter == "merged" else {}
    report = tried(inner, storages, torch.bfloat16) if merged else MergeReport({})
    if not lossy:
        refuse_loss(report, "export(..., lossy=True)")
    tensors = _tensors(inner, layout, storages, merged)
    described = {
        name + suffix: tensor
        for name, storage in storages.items()
        for suffix, tensor in STORAGES[storage].described(layout.form(name).shape, torch.bfloat16).items()
    }
    config = config_to_save(inner, packed=format == "mxfp4")
    config.dtype = "bfloat16"

    def write(folder: Path) -> None:
        write_checkpoint(inner, folder, config, described, tensors)
        _copy_tokenizer(Path(inner.name_or_path), folder)

    write_on_first(inner, tensors, path, write)
    if adapter == "apart":
        save_adapter(inner, Path(path) / APART)
    return report


def _tensors(
    model: nn.Module, layout: Layout, storages: dict[str, str], changes: dict[str, Change]
) -> Iterator[tuple[str, Tensor | None]]:
    """The whole tensors one after the other, on the first rank; the others get None."""
    mesh = mesh_of(model)
    for name, storage in storages.items():
        stored = Folded(model, name, changes.get(name)).stored(storage, torch.bfloat16)
        splits = replace(layout.form(name), storage=storage).stored_splits()
        for suffix, tensor in stored.items():
            if mesh is not None:
                yield name + suffix, mesh.gather(tensor, splits) if mesh.in_first_replica else None
            else:
                yield name + suffix, tensor


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in TOKENIZER:
        if source.is_dir() and (source / name).is_file() and source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)

"""What a model that several ranks hold together tells its user and the Trainer, and how it generates."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from ..core import Journal, Layout, Wrapper, layout_of
from ..distributed import ModelMesh, disagreements, ranks_of
from .save import save_pretrained
from .trainer import tell_trainer


def device_of(model: nn.Module) -> torch.device:
    """Where a model is."""
    return next(model.parameters()).device


def over_axis(layout: Layout, axis: DeviceMesh, *, own_tokens: bool = False) -> Layout:
    """`layout` on the ranks along `axis` too. Raises `ValueError` if it is on those of another mesh."""
    mesh = layout.mesh
    if mesh is None:
        names = ModelMesh.names_of(axis) if own_tokens else ()
        return layout.over(ModelMesh(axis, frozenset(names)))
    assert isinstance(mesh, ModelMesh)
    return layout.over(mesh.joined(axis, own_tokens=own_tokens))


def mesh_of(model: nn.Module) -> ModelMesh:
    """The ranks that hold a model together."""
    mesh = layout_of(model).mesh
    assert isinstance(mesh, ModelMesh)
    return mesh


def confer(mesh: DeviceMesh | None, model: nn.Module, stack: Sequence[Wrapper], problems: Sequence[str]) -> list[str]:
    """What other ranks have against wrapping their model so, or have otherwise."""
    if not distributed.is_available() or not distributed.is_initialized():
        return []
    # Whatever it is: that it is no GPT-OSS model may be among the problems.
    config = model.config.to_diff_dict() if isinstance(model, PreTrainedModel) else {}
    shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    statement = {
        "the wrappers": ", ".join(wrapper.name for wrapper in stack),
        **{f"{key} of {wrapper.name}": repr(value) for wrapper in stack for key, value in wrapper.options().items()},
        "the model": type(model).__name__,
        **{f"config.{key}": repr(value) for key, value in config.items()},
        "names, shapes and dtypes of the parameters": hashlib.sha256(repr(shapes).encode()).hexdigest()[:12],
    }
    return disagreements(statement, problems, ranks_of(mesh))


def set_sharded(model: nn.Module, mesh: ModelMesh, journal: Journal) -> None:
    """Tell the model, and through it transformers' Trainer, that ranks hold it together."""
    journal.set(model, "", "generate", partial(generate, mesh, model))
    journal.set(model, "", "save_pretrained", partial(save_pretrained, model))
    journal.set(model, "", "resize_token_embeddings", cannot_resize)
    tell_trainer(model, mesh, journal)


def cannot_resize(*args: Any, **kwargs: Any) -> None:
    """In the place of `resize_token_embeddings`."""
    raise ValueError(
        "resize_token_embeddings: the vocabulary is spread over ranks. Resize the model before it is sharded."
    )


def generate(mesh: ModelMesh, model: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' `generate`, where the ranks that share a batch also draw the same random numbers: the first's."""
    mesh.share_random_state(device_of(model))
    return type(model).generate(model, *args, **kwargs)

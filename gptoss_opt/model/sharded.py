"""What a model that several ranks hold together tells its user and the Trainer, and how it generates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
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


def confer(
    mesh: DeviceMesh | None, model: nn.Module | None, stack: Sequence[Wrapper], problems: Sequence[str]
) -> list[str]:
    """What other ranks have against wrapping their model so, or have otherwise."""
    if not distributed.is_available() or not distributed.is_initialized():
        return []
    # Whatever it is: that it is no GPT-OSS model may be among the problems.
    config = model.config.to_diff_dict() if isinstance(model, PreTrainedModel) else {}
    config = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    parameters = model.named_parameters() if model is not None else ()
    statement = {
        "the wrappers": ", ".join(wrapper.name for wrapper in stack),
        **{f"{key} of {wrapper.name}": _told(value) for wrapper in stack for key, value in wrapper.options().items()},
        "the model": type(model).__name__,
        **{f"config.{key}": repr(value) for key, value in config.items()},
        **{f"parameter {name}": _described(parameter) for name, parameter in parameters},
    }
    ranks = ranks_of(mesh)
    return disagreements(statement, problems, ranks) if distributed.get_rank() in ranks else []


def _described(parameter: torch.Tensor) -> str:
    """A parameter as ranks compare it: the whole ones with a sample of their values."""
    text = f"{list(parameter.shape)}, {parameter.dtype}, {'trained' if parameter.requires_grad else 'frozen'}"
    # What is only about to be loaded is one element, seen from everywhere.
    if isinstance(parameter, DTensor) or parameter.is_meta or (parameter.numel() > 1 and not any(parameter.stride())):
        return text
    values = parameter.detach().flatten()
    return f"{text}, sample {values[:: max(values.numel() // 4, 1)][:5].tolist()}"


def _told(option: object) -> str:
    """An option as ranks compare it: an axis of a mesh has other ranks for each, and is the same axis."""
    if isinstance(option, DeviceMesh):
        return f"axis {option.mesh_dim_names} of {option.size()} ranks"
    return repr(option)


def why_held_otherwise(model: nn.Module) -> Iterator[str]:
    """Whether something else has made DTensors of the parameters."""
    mesh = layout_of(model).mesh
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and not (mesh and mesh.holds(parameter)):
            yield f"{name} is a DTensor already, as after FSDP's fully_shard. Shard the model before that."
            return


def set_sharded(model: nn.Module, mesh: ModelMesh, journal: Journal) -> None:
    """Tell the model, and through it transformers' Trainer, that ranks hold it together."""
    if isinstance(model, PreTrainedModel) and model.can_generate():
        journal.set(model, "", "generate", partial(generate, mesh, model))
    journal.set(model, "", "save_pretrained", partial(save_pretrained, model))
    journal.set(model, "", "resize_token_embeddings", cannot_resize)
    tell_trainer(model, mesh, journal)


def cannot_resize(*args: Any, **kwargs: Any) -> None:
    """In the place of `resize_token_embeddings`."""
    raise ValueError(
        "resize_token_embeddings: the parameters are spread over ranks. Resize the model before it is sharded."
    )


def generate(mesh: ModelMesh, model: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' `generate`, where the ranks that share a batch also draw the same random numbers: the first's."""
    mesh.share_random_state(device_of(model))
    if mesh.own_tokens:
        # A rank that is done with its own sequences still has experts of the others'.
        kwargs.setdefault("synced_gpus", True)
    return type(model).generate(model, *args, **kwargs)

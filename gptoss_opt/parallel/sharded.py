"""What a model that several ranks hold together tells its user and the Trainer, and how it computes and generates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..checkpoint.save import save_pretrained
from ..core import Attachment, Filler, Spec, layout_of, mesh_of
from ..distributed import ModelMesh, Rule, bound_axis, disagreements, ranks_of, with_local_parameters
from ..layout import Layout, Mesh
from ..model.host import config_of
from .trainer import tell_trainer


def device_of(model: nn.Module) -> torch.device:
    """Where a model is."""
    return next(model.parameters()).device


def bind(
    model: nn.Module, bound: Mesh | None, mesh: DeviceMesh | None, degree: int | None, *, own_tokens: bool = False
) -> ModelMesh:
    """The ranks that hold the model together: those bound already, and those along one more axis."""
    axis = bound_axis(mesh, degree, device_of(model))
    first = bound if isinstance(bound, ModelMesh) else ModelMesh(axis)
    return first.joined(axis, own_tokens=own_tokens)


def confer(
    mesh: DeviceMesh | None, model: nn.Module | None, stack: Sequence[Spec], problems: Sequence[str]
) -> list[str] | None:
    """What other ranks have against wrapping their model so, or have otherwise; None if there are no others."""
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    parameters = model.named_parameters() if model is not None else ()
    statement = {
        "the wrappers": ", ".join(wrapper.name for wrapper in stack),
        **{f"{key} of {wrapper.name}": _told(value) for wrapper in stack for key, value in wrapper.options().items()},
        "the model": type(model).__name__,
        **{f"config.{key}": repr(value) for key, value in config_of(model).items()},
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
    """Say whether something else has made DTensors of the parameters."""
    mesh = mesh_of(model)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and not (mesh and mesh.holds(parameter)):
            yield f"{name} is a DTensor already, as after FSDP's fully_shard. Shard the model before that."
            return


def compute_locally(model: nn.Module, journal: Attachment) -> None:
    """Let every module that has parameters compute with what this rank holds of them."""
    mesh, layout = mesh_of(model), layout_of(model)
    data_axes = mesh.data_axes
    for path, module in model.named_modules():
        if module._parameters:
            rules = {
                name: _rule(f"{path}.{name}" if path else name, layout, mesh, data_axes) for name in module._parameters
            }
            needed = {name: rule for name, rule in rules.items() if rule != Rule()}
            journal.around(model, path, with_local_parameters, needed)


def _rule(parameter: str, layout: Layout, mesh: ModelMesh, data_axes: Mapping[str, DeviceMesh]) -> Rule:
    form = layout.form(parameter)
    split = {split.axis for split in form.splits}
    mean = tuple(axis for name, axis in data_axes.items() if name not in split)
    partial_over = tuple(mesh.axis(name) for name in form.partial)
    return Rule(mean, mesh.dp_size, partial_over, all(mesh.coordinate[axis] == 0 for axis in form.added_once))


def share_random_numbers(model: nn.Module, journal: Attachment) -> None:
    """Let ranks that share a batch draw the same random numbers when they generate."""
    if hasattr(model, "generate"):
        journal.set(model, "", "generate", partial(generate, mesh_of(model), model))


DEFAULTS: Mapping[str, Filler] = {
    "the parameters that modules compute with": compute_locally,
    "generating": share_random_numbers,
    "saving": lambda model, journal: journal.set(model, "", "save_pretrained", partial(save_pretrained, model)),
    "resizing": lambda model, journal: journal.set(model, "", "resize_token_embeddings", cannot_resize),
    "the Trainer": tell_trainer,
}
"""What all wrappers that shard a model fill: the first of a stack does."""


def cannot_resize(*args: Any, **kwargs: Any) -> None:
    """Stand in for `resize_token_embeddings`."""
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

"""Reading adapters into a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..checkpoint.adapter import AdapterFile
from ..checkpoint.peft_format import LAYOUTS
from ..checkpoint.reader import CheckpointError
from ..core import CompatibilityError, compose, layout_of, mesh_of, stack_of
from ..core.record import wrapped_model
from ..core.resolve import confer
from ..distributed import local_part
from ..layout import Form, take
from ..model.adapters import Adapter, adapters_on
from ..wrappers.lora import Lora, with_lora

Model = TypeVar("Model", bound=nn.Module)


def load_adapter(model: Model, path: str | os.PathLike[str], *, experts_layout: str | None = None) -> Model:
    """Read adapters that `save_adapter`, or peft on this architecture, has written, into a model; returns it.

    Without `with_lora` on the model it is applied as the adapter's config says; with it, both must say the same. Values
    of the model's own parameters that the folder holds (of `train=`, or peft's `modules_to_save`) are put there too.
    Some versions of peft took inputs for outputs in adapters of experts; that is seen and put right.

    Args:
        model: a GPT-OSS model, with wrappers or without, on one rank or several, each of which must call it.
        path: the folder.
        experts_layout: how the adapters of experts lie in the file, "in_out" or "swapped". It is asked for where
            nothing else tells: `down_proj` alone is adapted, and square.

    Raises:
        CheckpointError: the folder holds no adapter, or a damaged one, or one of another model.
        ValueError: its config asks for what is not served, or the adapters on the model are others.
        CompatibilityError: `with_lora` does not go on this model, or another rank cannot read the folder.

    Example:
        >>> save_adapter(with_lora(model, rank=4), folder)
        >>> stack_of(load_adapter(undo(model, with_lora), folder))
        compose(with_lora(rank=4))
    """
    if experts_layout not in (None, *LAYOUTS):
        raise ValueError(f"load_adapter: experts_layout is {experts_layout!r}. Use one of {', '.join(LAYOUTS)}.")
    inner: Any = wrapped_model(model)
    stack = stack_of(inner)
    try:
        wrapper, found = _read(inner, path, experts_layout)
    except Exception as error:
        # The other ranks that hold the model are about to ask whether all can go on.
        confer(stack.wrappers, inner, [f"{type(error).__name__}: {error}"])
        raise
    if problems := confer(stack.wrappers, inner, []):
        raise CompatibilityError(problems)
    if wrapper not in stack:
        wrapper(inner)
    for module in inner.modules():
        if isinstance(module, FSDPModule):  # what is whole now will be dropped
            module.reshard()
    for name, values in found.items():
        _put(inner.get_parameter(name), values(), layout_of(inner).form(name), mesh_of(inner))
    adapters_on(inner).state.keep(inner)
    return model


def _read(
    model: Any, path: str | os.PathLike[str], experts_layout: str | None
) -> tuple[Lora, Mapping[str, Callable[[], Tensor]]]:
    """The `with_lora` that a folder asks for, and what gives the values of each parameter. Touches nothing."""
    file = AdapterFile.open(path)
    wrapper, stack = _wrapper(model, with_lora(config=file.config)), stack_of(model)
    if problems := [] if wrapper in stack else list(wrapper.check(model)):
        raise CompatibilityError([f"{wrapper!r}: {problem}" for problem in problems])
    layout = compose(*stack, wrapper).layout(model)
    shapes = {name: layout.form(name).shape for name in layout}
    found = file.assigned(list(wrapper.adapted(model)), shapes, experts_layout)
    if packed := [name for name in found if name in layout.storages]:
        raise CheckpointError(
            f"{file.folder}: it has values of {packed[0]}, which this model stores as {layout.storages[packed[0]]!r}. "
            "Load it into a model that stores it dense: undo(model) first."
        )
    return wrapper, found


def _wrapper(model: nn.Module, asked: Lora) -> Lora:
    """The `with_lora` that is on a model, which must adapt what another one would, or else that one."""
    present = next((wrapper for wrapper in stack_of(model) if isinstance(wrapper, Lora)), asked)
    ours, theirs = present.adapted(model), asked.adapted(model)
    for place in (*ours, *theirs):
        one, other = ours.get(place), theirs.get(place)
        if one is None or other is None or (one[0], one[1].scale) != (other[0], other[1].scale):
            raise ValueError(
                f"load_adapter: {place.name} has {_said(one)} by {present!r}, which is on the model, and "
                f"{_said(other)} in the folder. undo(model, with_lora) first, or load it into a model without."
            )
    return present


def _said(adapter: tuple[int, Adapter] | None) -> str:
    return "no adapter" if adapter is None else f"one of rank {adapter[0]}, scaled by {adapter[1].scale:g},"


@torch.no_grad()
def _put(parameter: Tensor, values: Tensor, form: Form, mesh: Any) -> None:
    """Overwrite what this rank holds of a parameter with its part of whole values."""
    if mesh is None and isinstance(parameter, DTensor):  # as FSDP holds it
        like = parameter.device_mesh, parameter.placements
        values = distribute_tensor(values.to(parameter.device), *like, src_data_rank=None)  # each rank has them all
        parameter.copy_(values)
        return
    if mesh is not None:
        values = take(values, form.index(mesh.coordinate))
        if not mesh.holds(parameter):  # as FSDP holds it over another axis
            outer = mesh.outer_splits(parameter, form.splits)
            values = take(
                values,
                {
                    split.dim: split.parts[cast(DTensor, parameter).device_mesh.get_local_rank(split.axis)]
                    for split in outer
                },
            )
    local_part(parameter).copy_(values)

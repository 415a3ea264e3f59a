"""What a model that several ranks hold together tells its user and the Trainer, and how it computes and generates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..checkpoint.save import save_pretrained
from ..core import Attachment, Filler, Host, Phase, Spec, Wrapper, layout_of, mesh_of
from ..distributed import (
    ModelMesh,
    Rule,
    Shape,
    axis_of,
    bound_axis,
    check_axis,
    disagreements,
    ranks_of,
    why_no_axis,
    with_local_parameters,
)
from ..layout import Axis, Layout, Mesh, require
from ..model.host import GPT_OSS, config_of
from ..model.saving import SAVING
from .trainer import tell_trainer


def device_of(model: nn.Module) -> torch.device:
    """Where a model is."""
    return next(model.parameters()).device


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
        journal.method(model, "", "generate", generate)


def why_foreign(layout: Layout, regions: Iterable[str], axis: str) -> Iterator[str]:
    """Say which parameters stand where each rank computes a part, and have no part in it."""
    inside, foreign = tuple(f"{path}." for path in regions), list[str]()
    for name in (name for name in layout if name.startswith(inside)):
        form = layout.form(name)
        if axis not in (*form.partial, *form.added_once, *(split.axis for split in form.splits)):
            foreign.append(name)
    if foreign:
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        yield (
            f"{foreign[0]}{more} stands in a module that is spread over ranks, and would be trained wrong there. Take "
            "it out first (peft: merge_and_unload()). shard_experts alone leaves attention whole, to be adapted."
        )


DEFAULTS: dict[str, Filler] = {
    "the parameters that modules compute with": compute_locally,
    "generating": share_random_numbers,
    SAVING: lambda model, journal: journal.method(model, "", "save_pretrained", save_pretrained),
    "resizing": lambda model, journal: journal.set(model, "", "resize_token_embeddings", cannot_resize),
    "the Trainer": tell_trainer,
}
"""What all wrappers that shard a model fill: the first of a stack does."""


def cannot_resize(*args: Any, **kwargs: Any) -> None:
    """Stand in for `resize_token_embeddings`."""
    raise ValueError(
        "resize_token_embeddings: the parameters are spread over ranks. Resize the model before it is sharded."
    )


def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' `generate`, where the ranks that share a batch also draw the same random numbers: the first's."""
    mesh = mesh_of(model)
    mesh.share_random_state(device_of(model))
    if mesh.own_tokens:
        # A rank that is done with its own sequences still has experts of the others'.
        kwargs.setdefault("synced_gpus", True)
    return type(model).generate(model, *args, **kwargs)


@dataclass(frozen=True, kw_only=True, repr=False)
class Sharding(Wrapper):
    """Base of the wrappers that spread a model over the ranks along an axis: of a mesh, or as many as `degree` says.

    Of a mesh that is given as its shape, a wrapper takes the axis that is called `own`.
    """

    mesh: DeviceMesh | Shape | None = None
    degree: int | None = None

    own: ClassVar[str]
    phase: ClassVar[Phase] = Phase.PARALLEL
    host: ClassVar[Host] = GPT_OSS
    defaults: ClassVar[Mapping[str, Filler]] = DEFAULTS
    provides: ClassVar[tuple[str, ...]] = ("shards",)
    reversible: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_axis(self.mesh, self.degree, self.own, self.name)

    @property
    def own_tokens(self) -> bool:
        """Whether each rank has tokens of its own."""
        return False

    @property
    def axis(self) -> Axis:
        """The axis over which the model is spread."""
        return axis_of(self.mesh, self.degree, self.own, data_parallel=self.own_tokens)

    def why_not(self, model: nn.Module) -> Iterable[str]:
        """What stands in the way of spreading this model over as many ranks, as sentences."""
        raise NotImplementedError

    def spread(self, model: nn.Module, layout: Layout) -> Layout:
        """`layout` with the model spread over the axis."""
        raise NotImplementedError

    def regions(self, model: nn.Module) -> Iterable[str]:
        """The paths of the modules of which each rank computes a part."""
        raise NotImplementedError

    def check(self, model: nn.Module) -> Iterable[str]:
        if problem := why_no_axis(self.mesh, self.degree, device_of(model)):
            return [problem]
        return self.why_not(model)

    def confer(self, model: nn.Module | None, stack: Sequence[Spec], problems: Sequence[str]) -> list[str] | None:
        if not distributed.is_available() or not distributed.is_initialized():
            return None
        options = [(f"{key} of {one.name}", value) for one in stack for key, value in one.options().items()]
        parameters = model.named_parameters() if model is not None else ()
        statement = {
            "the wrappers": ", ".join(one.name for one in stack),
            **{key: _told(value) for key, value in options},
            "the model": type(model).__name__,
            **{f"config.{key}": repr(value) for key, value in config_of(model).items()},
            **{f"parameter {name}": _described(parameter) for name, parameter in parameters},
        }
        ranks = ranks_of(self.mesh)
        return disagreements(statement, problems, ranks) if distributed.get_rank() in ranks else []

    def layout(self, model: nn.Module, layout: Layout) -> Layout:
        require(self.why_not(model))
        layout = self.spread(model, layout.over(self.axis))
        require(why_foreign(layout, self.regions(model), self.axis.name))
        return layout

    def bind(self, model: nn.Module, mesh: Mesh | None) -> ModelMesh:
        axis = bound_axis(self.mesh, self.degree, self.own, device_of(model))
        first = mesh if isinstance(mesh, ModelMesh) else ModelMesh(axis)
        return first.joined(axis, own_tokens=self.own_tokens)

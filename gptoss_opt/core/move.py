"""The one executor of layouts: it moves the bytes of parameters into the form that a layout asks for.

The bytes come from a source: the tensors that the model has now, or a checkpoint. So wrapping a model and loading one
are the same thing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .layout import DENSE, STORAGES, Form, Layout, Mesh, Source, Stored, stored_splits, take


@dataclass(frozen=True)
class Held:
    """How a parameter is held that is not a plain dense one.

    Attributes:
        form: its storage, and which slice this rank has.
        mesh: the ranks that hold the model together, if there are several.
        sqnr: how exactly, as signal-to-quantisation-noise ratio in dB.
        requires_grad: whether the dense parameter took gradients.
    """

    form: Form
    mesh: Mesh | None
    sqnr: float
    requires_grad: bool

    def names(self, name: str) -> list[str]:
        """What it is called by its module, where the dense parameter is called `name`."""
        return [f"{name}{suffix}" for suffix in STORAGES[self.form.storage].suffixes]

    def stands(self, model: nn.Module, parameter: str) -> bool:
        """Whether the model still holds it so, or the user has changed that since."""
        module, name = _place(model, parameter)
        names, held = self.names(name), module._parameters
        if (name in held) != (name in names) or any(held.get(one) is None for one in names):
            return False
        return self.mesh is None or all(self.mesh.holds(module.get_parameter(one)) for one in names)


def _place(model: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    path, _, name = parameter.rpartition(".")
    return model.get_submodule(path), name


def exchange(module: nn.Module, name: str, new: Mapping[str, nn.Parameter], *more: str) -> None:
    """Put parameters `new` in the place of `name` (and `more`) of a module, where the order of parameters has them."""
    parameters = [
        pair
        for key, value in module._parameters.items()
        for pair in (new.items() if key == name else () if key in more else ((key, value),))
    ]
    module._parameters.clear()
    module._parameters.update(parameters)


Tensors = Mapping[str, nn.Parameter]


@dataclass
class Move:
    """The parameters that went from one layout into another, until it is settled that they stay: then drop it.

    Attributes:
        held: how the parameters that are not plain are held now.
        exchanged: in which module, what was exchanged for what.
    """

    held: dict[str, Held]
    exchanged: list[tuple[nn.Module, Tensors, Tensors]] = field(
        default_factory=list[tuple[nn.Module, Tensors, Tensors]]
    )

    def exchange(self, module: nn.Module, old: list[str], new: Tensors) -> None:
        """Put `new` in the place of the parameters called `old`."""
        before = {name: module.get_parameter(name) for name in old}
        exchange(module, old[0], new, *old[1:])
        self.exchanged.append((module, before, new))

    def undo(self) -> None:
        """Put the old parameters back, bit for bit."""
        while self.exchanged:
            module, before, new = self.exchanged.pop()
            first, *more = new
            exchange(module, first, before, *more)


@torch.inference_mode(False)
def move(model: nn.Module, held: Mapping[str, Held], layout: Layout, source: Source | None = None) -> Move:
    """Bring the parameters of `model` into `layout`, from `source` or else from the tensors it has now.

    Only those move that are held otherwise than `layout` wants them. All are made before the first is exchanged.

    Args:
        model: to be changed.
        held: how its parameters are held now, where they are not plain.
        layout: how they are to be held.
        source: where their values come from, if not from the model.
    """
    held = {parameter: how for parameter, how in held.items() if how.stands(model, parameter)}
    now = {parameter: _now(model, parameter, held.get(parameter)) for parameter in _parameters(model, held)}
    wanted = {parameter: (layout.form(parameter), layout.mesh) for parameter in now}
    moving = {parameter: how for parameter, how in now.items() if (how.form, how.mesh) != wanted[parameter]}
    # A source shows its own progress. A small model is done before the bar would show.
    bar = tqdm(moving.items(), desc="laying out", unit="tensor", delay=2, leave=False, disable=source is not None)
    made: dict[str, tuple[Held, Tensors]] = {}
    for parameter, how in bar:
        form, mesh = wanted[parameter]
        if source is None:
            stored = _changed(model, parameter, how, form, mesh)
        else:
            stored = source(parameter, form, form.index(mesh.coordinate) if mesh else {})
        made[parameter] = _made(stored, how, form, mesh)
    done = Move({parameter: how for parameter, how in held.items() if parameter not in moving})
    places = _places(model)
    for parameter, (how, new) in made.items():
        suffixes = STORAGES[now[parameter].form.storage].suffixes
        module, name = _place(model, parameter)
        # Tied parameters have several places.
        for place, first in places[id(module.get_parameter(name + suffixes[0]))]:
            alias = first.removesuffix(suffixes[0])
            old = [alias + suffix for suffix in suffixes]
            done.exchange(place, old, {alias + suffix: value for suffix, value in new.items()})
        if wanted[parameter] != (Form(), None):
            done.held[parameter] = how
    return done


def _parameters(model: nn.Module, held: Mapping[str, Held]) -> Iterator[str]:
    """All parameters of a model by the name they have when dense, in order."""
    dense = {f"{name}{suffix}": name for name, how in held.items() for suffix in STORAGES[how.form.storage].suffixes}
    yield from dict.fromkeys(dense.get(name, name) for name, _ in model.named_parameters())


def _now(model: nn.Module, parameter: str, how: Held | None) -> Held:
    """How a parameter is held; the user may have frozen it since."""
    how = how or Held(Form(), None, float("inf"), False)
    if how.form.storage != DENSE.name:
        return how
    return replace(how, requires_grad=model.get_parameter(parameter).requires_grad)


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each parameter object is: in which modules, under which names."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            places.setdefault(id(parameter), []).append((module, name))
    return places


def _changed(model: nn.Module, parameter: str, how: Held, form: Form, mesh: Mesh | None) -> Stored:
    """What this rank is to hold of a parameter, made from what it holds now."""
    module, name = _place(model, parameter)
    suffixes = STORAGES[how.form.storage].suffixes
    tensors = {suffix: module.get_parameter(f"{name}{suffix}") for suffix in suffixes}
    local = {suffix: (how.mesh.local(t) if how.mesh else t.detach()) for suffix, t in tensors.items()}
    if how.form.splits != form.splits:
        local = {suffix: _resliced(tensor, how, form, mesh) for suffix, tensor in local.items()}
    if how.form.storage == form.storage:
        return Stored(local, how.sqnr)
    # The model may have been cast since: the rest of the module tells.
    dtype = next(value.dtype for value in module.parameters() if value.is_floating_point())
    return STORAGES[form.storage].encode(STORAGES[how.form.storage].decode(local, dtype))


def _resliced(tensor: Tensor, how: Held, form: Form, mesh: Mesh | None) -> Tensor:
    """A stored tensor, of which this rank is to hold another slice."""
    if how.mesh is not None and how.form.splits:
        tensor = how.mesh.whole(tensor, stored_splits(how.form))
    if mesh is None or not form.splits:
        return tensor
    in_storage = Form(splits=tuple(stored_splits(Form(how.form.storage, form.splits))))
    return take(tensor, in_storage.index(mesh.coordinate)).clone(memory_format=torch.contiguous_format)


def _made(stored: Stored, how: Held, form: Form, mesh: Mesh | None) -> tuple[Held, Tensors]:
    """How they are held now, and the new parameters by suffix. What is not dense takes no gradients."""
    requires_grad = how.requires_grad and form.storage == DENSE.name
    splits = stored_splits(form)

    def parameter(tensor: Tensor) -> nn.Parameter:
        if mesh is not None:
            return mesh.parameter(tensor, splits, requires_grad)
        return nn.Parameter(tensor, requires_grad=requires_grad)

    new = {suffix: parameter(tensor) for suffix, tensor in stored.tensors.items()}
    return Held(form, mesh, stored.sqnr, how.requires_grad), new

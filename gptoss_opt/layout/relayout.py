"""The one executor of layouts: it brings the parameters of a model into the forms that a layout asks for.

The bytes come from a source: the tensors that the model has now, or a checkpoint. So wrapping a model, loading one and
laying it out anew are the same thing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .initial import first_values
from .layout import Form, Layout, LayoutError
from .storage import DENSE, STORAGES, Part, Split, Stored, take

Parameters = Mapping[str, nn.Parameter]
PLAIN = Form()


class Source(Protocol):
    """Where the bytes of parameters come from, if not from the model. A call gives a slice in the storage of a form.

    First it is told in which forms it will be asked for which parameters, by the rank at a coordinate.
    """

    def expect(self, forms: Mapping[str, Form], coordinate: Mapping[str, int]) -> None: ...
    def __call__(self, parameter: str, form: Form, index: Mapping[int, Part]) -> Stored: ...


class Mesh(Protocol):
    """The ranks that hold a model together, as far as its parameters go: see `ModelMesh`. Meshes are equal by value."""

    @property
    def coordinate(self) -> Mapping[str, int]: ...
    def parameter(self, local: Tensor, splits: Sequence[Split], requires_grad: bool) -> nn.Parameter: ...
    def holds(self, parameter: Tensor) -> bool: ...
    def local(self, parameter: Tensor) -> Tensor: ...
    def whole(self, local: Tensor, splits: Sequence[Split]) -> Tensor: ...
    def describe(self, model: nn.Module) -> str: ...


@dataclass(frozen=True)
class Held:
    """How a parameter is held that is not plain.

    Attributes:
        form: its storage, and which slice this rank has.
        mesh: the ranks that hold the model together, if there are several.
        sqnr: how exact it is, as signal-to-quantisation-noise ratio in dB.
        requires_grad: whether the dense parameter took gradients.
    """

    form: Form
    mesh: Mesh | None = None
    sqnr: float = float("inf")
    requires_grad: bool = False

    def names(self, parameter: str) -> list[str]:
        """The names of its tensors, where the dense parameter is called `parameter`."""
        return [f"{parameter}{suffix}" for suffix in STORAGES[self.form.storage].suffixes]

    def stands(self, model: nn.Module, parameter: str) -> bool:
        """Whether the model still holds it so, and the user has not changed that since."""
        path, _, name = parameter.rpartition(".")
        module = dict(model.named_modules()).get(path)
        if module is None:
            return False
        names, held = self.names(name), module._parameters
        if (name in held) != (name in names) or any(held.get(one) is None for one in names):
            return False
        return self.mesh is None or all(self.mesh.holds(module.get_parameter(one)) for one in names)


def _place(model: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    path, _, name = parameter.rpartition(".")
    return model.get_submodule(path), name


def exchange(module: nn.Module, name: str, new: Parameters, *more: str) -> None:
    """Put parameters `new` in the place of `name` (and `more`) of a module, where the order of parameters has them."""
    parameters = [
        pair
        for key, value in module._parameters.items()
        for pair in (new.items() if key == name else () if key in more else ((key, value),))
    ]
    module._parameters.clear()
    module._parameters.update(parameters)


@dataclass
class Relaid:
    """What became of a model's parameters.

    Attributes:
        held: how the parameters that are not plain are held now.
        before: the parameters that each module had that was changed, until it is settled that the change stays.
    """

    held: dict[str, Held]
    before: dict[nn.Module, Mapping[str, nn.Parameter | None]] = field(default_factory=dict)

    def undo(self) -> None:
        """Put the old parameters back, bit for bit."""
        for module, parameters in self.before.items():
            module._parameters.clear()
            module._parameters.update(parameters)


def dense_layout(model: nn.Module, held: Mapping[str, Held] | None = None) -> Layout:
    """The layout of a model without wrappers: each of its own parameters dense and whole.

    It reads shapes and dtypes only, so that the model may be on the meta device.

    Args:
        model: with wrappers, or without.
        held: how its parameters are held now, where they are not plain.
    """
    held = held or {}
    stored = {
        name for parameter, how in held.items() if how.form.storage != DENSE.name for name in how.names(parameter)
    }
    forms = {}
    for parameter in _parameters(model, held):
        how = held.get(parameter, Held(PLAIN))
        if how.form.new:
            continue
        if how.form.storage == DENSE.name:
            value = model.get_parameter(parameter)
            forms[parameter] = Form(shape=tuple(value.shape), dtype=value.dtype)
        else:
            forms[parameter] = Form(shape=how.form.shape, dtype=_dtype_of(model, parameter, stored) or how.form.dtype)
    return Layout(forms)


def _dtype_of(model: nn.Module, parameter: str, stored: set[str]) -> torch.dtype | None:
    """The dtype of a parameter's module, else of the model: it may have been cast since the parameter was stored."""
    path = parameter.rpartition(".")[0]
    for beside in (model.get_submodule(path).named_parameters(prefix=path), model.named_parameters()):
        for name, value in beside:
            if name not in stored and value.is_floating_point():
                return value.dtype
    return None


@torch.inference_mode(False)
def relayout(
    model: nn.Module, held: Mapping[str, Held], layout: Layout, mesh: Mesh | None = None, source: Source | None = None
) -> Relaid:
    """Bring the parameters of `model` into `layout`, from `source` or else from the tensors it has now.

    Without a source only those move that are held otherwise than `layout` wants them; with one all do. New parameters
    are created, and those that no wrapper asks for any more are dropped. All are made before the first is exchanged.

    Args:
        model: to be changed.
        held: how its parameters are held now, where they are not plain.
        layout: how they are to be held: every parameter of the model, and new ones.
        mesh: the ranks of the layout's axes, if it has any.
        source: where the values of all parameters that are not new come from, if not from the model.
    """
    held = {parameter: how for parameter, how in held.items() if how.stands(model, parameter)}
    now = {parameter: _now(model, parameter, held.get(parameter)) for parameter in _parameters(model, held)}
    wanted = {
        parameter: layout.form(parameter) for parameter in layout if parameter in now or layout.asked[parameter].new
    }
    moving = {
        parameter: form
        for parameter, form in wanted.items()
        if parameter not in now
        or (source is not None and not form.new)
        or (now[parameter].form, now[parameter].mesh) != (form, mesh)
    }
    coordinate = mesh.coordinate if mesh else {}
    if source is not None:
        source.expect({parameter: form for parameter, form in moving.items() if not form.new}, coordinate)
    # A source shows its own progress. A small model is done before the bar would show.
    # What is encoded needs room meanwhile: if it came between tensors that stay, memory would be full of gaps.
    order = sorted(moving, key=lambda parameter: moving[parameter].storage == DENSE.name)
    made: dict[str, tuple[Held, Parameters]] = {}
    for parameter in tqdm(order, "laying out", unit="tensor", delay=2, leave=False, disable=source is not None):
        form = moving[parameter]
        how = now.get(parameter)
        if how is None:
            stored = _created(model, parameter, form, coordinate)
            how = Held(form, requires_grad=form.new is not None and form.new.trainable)
        elif source is not None and not form.new:
            stored = source(parameter, form, form.index(coordinate))
        else:
            stored = _changed(model, parameter, how, form, mesh)
        made[parameter] = _made(stored, how, form, mesh)
    dropped = [parameter for parameter in now if parameter not in wanted]
    done = Relaid({parameter: how for parameter, how in held.items() if parameter not in (*moving, *dropped)})
    places = _places(model)
    try:
        for parameter in (*made, *dropped):
            how, new = made.get(parameter, (None, {}))
            _exchange_everywhere(model, parameter, now.get(parameter), new, places, done)
            if how is not None and (wanted[parameter], mesh) != (PLAIN, None):
                done.held[parameter] = how
        for module in done.before:
            _sort_new(module, {name.rpartition(".")[2] for name in layout.new if _place(model, name)[0] is module})
    except BaseException:
        done.undo()
        raise
    return done


def _exchange_everywhere(
    model: nn.Module,
    parameter: str,
    how: Held | None,
    new: Parameters,
    places: Mapping[int, Sequence[tuple[nn.Module, str]]],
    done: Relaid,
) -> None:
    """Put new tensors, by suffix, in the place of those of a parameter: in all its places, if it is tied to others."""
    module, name = _place(model, parameter)
    if how is None:
        done.before.setdefault(module, dict(module._parameters))
        module._parameters.update({name + suffix: value for suffix, value in new.items()})
        return
    suffixes = STORAGES[how.form.storage].suffixes
    for place, first in places[id(module.get_parameter(name + suffixes[0]))]:
        alias = first.removesuffix(suffixes[0])
        first, *more = (alias + suffix for suffix in suffixes)
        done.before.setdefault(place, dict(place._parameters))
        exchange(place, first, {alias + suffix: value for suffix, value in new.items()}, *more)


def _sort_new(module: nn.Module, new: set[str]) -> None:
    for name in sorted(new):
        module._parameters[name] = module._parameters.pop(name)


def _parameters(model: nn.Module, held: Mapping[str, Held]) -> Iterator[str]:
    """All parameters of a model by the name they have when dense, in order."""
    dense = {tensor: name for name, how in held.items() for tensor in how.names(name)}
    yield from dict.fromkeys(dense.get(name, name) for name, _ in model.named_parameters())


def _now(model: nn.Module, parameter: str, how: Held | None) -> Held:
    how = how or Held(PLAIN)
    if how.form.storage != DENSE.name:
        return how
    return replace(how, requires_grad=model.get_parameter(parameter).requires_grad)


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            places.setdefault(id(parameter), []).append((module, name))
    return places


def _created(model: nn.Module, parameter: str, form: Form, coordinate: Mapping[str, int]) -> Stored:
    beside = next(chain(_place(model, parameter)[0].parameters(), model.parameters()))
    values = first_values(parameter, form, form.index(coordinate))
    return Stored({"": values.to(beside.device)})


def _changed(model: nn.Module, parameter: str, how: Held, form: Form, mesh: Mesh | None) -> Stored:
    """What this rank is to hold of a parameter, made from what it holds now."""
    module, name = _place(model, parameter)
    tensors = {suffix: module.get_parameter(f"{name}{suffix}") for suffix in STORAGES[how.form.storage].suffixes}
    local = {suffix: (how.mesh.local(t) if how.mesh else t.detach()) for suffix, t in tensors.items()}
    if how.form.splits != form.splits:
        local = {suffix: _resliced(tensor, how, form, mesh) for suffix, tensor in local.items()}
    if how.form.storage == form.storage:
        return Stored(local, how.sqnr)
    return STORAGES[form.storage].encode(STORAGES[how.form.storage].decode(local, form.dtype))


def _resliced(tensor: Tensor, how: Held, form: Form, mesh: Mesh | None) -> Tensor:
    if how.mesh is not None and how.form.splits:
        tensor = how.mesh.whole(tensor, how.form.stored_splits())
    if mesh is None or not form.splits:
        return tensor
    in_storage = Form(splits=tuple(replace(form, storage=how.form.storage).stored_splits()))
    return take(tensor, in_storage.index(mesh.coordinate)).clone(memory_format=torch.contiguous_format)


def _made(stored: Stored, how: Held, form: Form, mesh: Mesh | None) -> tuple[Held, Parameters]:
    """How a parameter is held now, and its new tensors by suffix. What is not dense takes no gradients."""
    requires_grad = how.requires_grad and form.storage == DENSE.name
    splits = form.stored_splits()

    def parameter(tensor: Tensor) -> nn.Parameter:
        if mesh is not None:
            return mesh.parameter(tensor, splits, requires_grad)
        return STORAGES[form.storage].kind(tensor, requires_grad=requires_grad)

    suffixes = STORAGES[form.storage].suffixes
    if set(stored.tensors) != set(suffixes):
        raise LayoutError(
            f"storage {form.storage!r} says that its suffixes are {suffixes}, and gave {[*stored.tensors]}."
        )
    new = {suffix: parameter(tensor) for suffix, tensor in stored.tensors.items()}
    return Held(form, mesh, stored.sqnr, how.requires_grad), new

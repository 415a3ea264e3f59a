"""Layout: how each parameter is stored. Wrappers edit it as data; one executor moves the bytes.

The bytes come from a source: the tensors that the model has now, or a checkpoint. So wrapping a model and loading one
are the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Stored:
    """A parameter as its storage holds it: tensors by the suffix of their names, and how exact they are.

    Attributes:
        tensors: such as `{"_blocks": ..., "_scales": ...}`.
        sqnr: the signal-to-quantisation-noise ratio in dB; infinite where exact.
    """

    tensors: Mapping[str, Tensor]
    sqnr: float = float("inf")


class Sliced(Protocol):
    """A tensor, or what gives its slices along the first dimension one by one, such as a tensor still in a file."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def device(self) -> torch.device: ...
    def __getitem__(self, index: int, /) -> Tensor: ...


class Storage(Protocol):
    """A way to hold a parameter as one tensor or more, beside plain dense."""

    name: str
    suffixes: tuple[str, ...]

    def encode(self, dense: Sliced) -> Stored:
        """Dense values as this storage holds them."""
        ...

    def decode(self, tensors: Mapping[str, Sliced], dtype: torch.dtype) -> Tensor:
        """The dense values."""
        ...


STORAGES: dict[str, Storage] = {}
"""Every storage by name: how a journal, which is plain data, finds it again."""

Source = Callable[[str, Storage], Stored]
"""Where the bytes come from: gives a parameter, by its dense name, as a storage holds it."""


@dataclass(frozen=True)
class Layout:
    """The storage of each parameter that is not dense, by the name the parameter has when it is. Pure data.

    Example:
        >>> Layout().store(["experts.down_proj"], "mxfp4").storages
        {'experts.down_proj': 'mxfp4'}
    """

    storages: Mapping[str, str] = field(default_factory=dict)

    def store(self, parameters: Iterable[str], storage: str) -> Layout:
        """This layout with `parameters` in `storage`."""
        return replace(self, storages={**self.storages, **dict.fromkeys(parameters, storage)})


@dataclass(frozen=True)
class Held:
    """How a parameter that is not dense is held.

    Attributes:
        storage: the name of its storage.
        sqnr: how exactly, as signal-to-quantisation-noise ratio in dB.
        requires_grad: whether the dense parameter took gradients.
    """

    storage: str
    sqnr: float
    requires_grad: bool

    def names(self, name: str) -> list[str]:
        """What it is called by its module, where the dense parameter is called `name`."""
        return [f"{name}{suffix}" for suffix in STORAGES[self.storage].suffixes]

    def stands(self, model: nn.Module, parameter: str) -> bool:
        """Whether the model still holds it so, or the user has changed that since."""
        module, name = _place(model, parameter)
        return name not in module._parameters and all(one in module._parameters for one in self.names(name))


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
        held: how the parameters that are not dense are held now.
        exchanged: for each parameter, what was exchanged for what.
    """

    held: dict[str, Held]
    exchanged: list[tuple[str, Tensors, Tensors]] = field(default_factory=list[tuple[str, Tensors, Tensors]])

    def exchange(self, model: nn.Module, parameter: str, old: list[str], new: Tensors) -> None:
        """Put `new` in the place of the parameters called `old`."""
        module, _ = _place(model, parameter)
        before = {name: module.get_parameter(name) for name in old}
        exchange(module, old[0], new, *old[1:])
        self.exchanged.append((parameter, before, new))

    def undo(self, model: nn.Module) -> None:
        """Put the old parameters back, bit for bit."""
        while self.exchanged:
            parameter, before, new = self.exchanged.pop()
            first, *more = new
            exchange(_place(model, parameter)[0], first, before, *more)


@torch.inference_mode(False)
def move(model: nn.Module, held: Mapping[str, Held], layout: Layout, source: Source | None = None) -> Move:
    """Bring the parameters of `model` into `layout`, from `source` or else from the tensors it has now.

    Only those move that are held otherwise than `layout` wants them. All are made before the first is exchanged.

    Args:
        model: to be changed.
        held: how its parameters are held now, where they are not dense.
        layout: how they are to be held.
        source: where their values come from, if not from the model.
    """
    held = {parameter: how for parameter, how in held.items() if how.stands(model, parameter)}
    stay = {parameter for parameter, how in held.items() if layout.storages.get(parameter) == how.storage}
    coming = {parameter: storage for parameter, storage in layout.storages.items() if parameter not in stay}
    going = {parameter: how for parameter, how in held.items() if parameter not in stay}
    dense = {parameter: _decoded(model, parameter, how) for parameter, how in going.items()}

    def read(parameter: str, storage: Storage) -> Stored:
        tensor = dense[parameter] if parameter in dense else model.get_parameter(parameter)
        return storage.encode(tensor.detach())

    # A source shows its own progress. A small model is done before the bar would show.
    bar = tqdm(coming.items(), desc="packing", unit="tensor", delay=2, leave=False, disable=source is not None)
    stored = {parameter: (source or read)(parameter, STORAGES[storage]) for parameter, storage in bar}
    done = Move({parameter: held[parameter] for parameter in held if parameter in stay})
    for parameter, how in going.items():
        name = _place(model, parameter)[1]
        done.exchange(model, parameter, how.names(name), {name: dense[parameter]})
    for parameter, storage in coming.items():
        name = _place(model, parameter)[1]
        requires_grad = model.get_parameter(parameter).requires_grad
        new = {f"{name}{suffix}": tensor for suffix, tensor in stored[parameter].tensors.items()}
        frozen = {key: nn.Parameter(tensor, requires_grad=False) for key, tensor in new.items()}
        done.exchange(model, parameter, [name], frozen)
        done.held[parameter] = Held(storage, stored[parameter].sqnr, requires_grad)
    return done


def _decoded(model: nn.Module, parameter: str, how: Held) -> nn.Parameter:
    module, name = _place(model, parameter)
    storage = STORAGES[how.storage]
    tensors = {suffix: module.get_parameter(f"{name}{suffix}") for suffix in storage.suffixes}
    # The model may have been cast since: the rest of the module tells.
    dtype = next(value.dtype for value in module.parameters() if value.is_floating_point())
    return nn.Parameter(storage.decode(tensors, dtype), requires_grad=how.requires_grad)

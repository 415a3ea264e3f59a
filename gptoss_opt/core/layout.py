"""Layout: how each parameter is stored, and which slice of it each rank holds. Wrappers edit it as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .edit import Journal

Part = range | tuple[int, ...]
"""Indices along one dimension, ascending."""


@dataclass(frozen=True)
class Split:
    """One dimension of a parameter, spread over the ranks of a mesh axis.

    Attributes:
        dim: the dimension.
        axis: the name of the axis.
        parts: the indices that each rank holds, by its coordinate on the axis. Each index is in one of them.
    """

    dim: int
    axis: str
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Of the whole dimension."""
        return sum(map(len, self.parts))


@dataclass(frozen=True)
class Form:
    """How a parameter is held: in which storage, and which slice of it by each rank.

    Attributes:
        storage: the name of its storage.
        splits: its dimensions that are spread over ranks, each over another axis.
        added: axes over whose ranks the result is summed up, to which the parameter is added: it counts on one of them.
    """

    storage: str = "dense"
    splits: tuple[Split, ...] = ()
    added: tuple[str, ...] = ()

    def index(self, coordinate: Mapping[str, int]) -> dict[int, Part]:
        """The indices that the rank at a `coordinate` (by axis) holds, for each dimension that is split."""
        return {split.dim: split.parts[coordinate[split.axis]] for split in self.splits}


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
    """A way to hold a parameter as one tensor or more."""

    name: str
    suffixes: tuple[str, ...]

    def encode(self, dense: Sliced) -> Stored:
        """Dense values as this storage holds them."""
        ...

    def decode(self, tensors: Mapping[str, Sliced], dtype: torch.dtype) -> Tensor:
        """The dense values."""
        ...

    def split(self, split: Split) -> Split:
        """Where a split of the dense parameter falls in the stored tensors. `ValueError` if it would tear one value."""
        ...

    def num_bytes(self, num_values: int, itemsize: int) -> int:
        """Of so many values, whose dense ones have `itemsize` bytes each."""
        ...


class Dense:
    """Plain: the parameter as it is."""

    name: str = "dense"
    suffixes: tuple[str, ...] = ("",)

    def encode(self, dense: Sliced) -> Stored:
        """The tensor itself."""
        assert isinstance(dense, Tensor)
        return Stored({"": dense})

    def decode(self, tensors: Mapping[str, Sliced], dtype: torch.dtype) -> Tensor:
        """The tensor itself."""
        dense = tensors[""]
        assert isinstance(dense, Tensor)
        return dense

    def split(self, split: Split) -> Split:
        """The split itself."""
        return split

    def num_bytes(self, num_values: int, itemsize: int) -> int:
        """Of so many values."""
        return num_values * itemsize


DENSE = Dense()
STORAGES: dict[str, Storage] = {DENSE.name: DENSE}
"""Every storage by name: how a journal, which is plain data, finds it again."""

Source = Callable[[str, Form, Mapping[int, Part]], Stored]
"""Where the bytes come from: gives a slice of a parameter, by its dense name and indices, in the storage of a form."""


class Mesh(Protocol):
    """The ranks that hold a model together. Equal by value."""

    @property
    def coordinate(self) -> Mapping[str, int]:
        """Where this rank is, by axis."""
        ...

    def parameter(self, local: Tensor, splits: Sequence[Split], requires_grad: bool) -> nn.Parameter:
        """A parameter of which this rank holds `local`."""
        ...

    def holds(self, parameter: Tensor) -> bool:
        """Whether it is one made by `parameter`."""
        ...

    def local(self, parameter: Tensor) -> Tensor:
        """What this rank holds of it, without gradient."""
        ...

    def whole(self, local: Tensor, splits: Sequence[Split]) -> Tensor:
        """The whole tensor, gathered from the ranks; all of them must ask for it."""
        ...

    def describe(self, model: nn.Module) -> str:
        """What this rank holds of a model, as a sentence."""
        ...

    def lay_out(self, model: nn.Module, layout: Layout, journal: Journal) -> None:
        """Let every module compute with what this rank holds of its parameters."""
        ...


@dataclass(frozen=True)
class Layout:
    """How each parameter is held that is not dense and whole, by the name that it has when it is. Pure data.

    Attributes:
        forms: how each is held.
        mesh: the ranks that hold the model together; None if this process holds all of it.

    Example:
        >>> layout = Layout().store(["experts.down_proj"], "mxfp4")
        >>> layout = layout.split(["experts.down_proj"], Split(0, "ep", (range(0, 2), range(2, 4))))
        >>> layout.form("experts.down_proj").storage, layout.form("experts.down_proj").index({"ep": 1})
        ('mxfp4', {0: range(2, 4)})
    """

    forms: Mapping[str, Form] = field(default_factory=dict)
    mesh: Mesh | None = None

    def form(self, parameter: str) -> Form:
        """How a parameter is to be held."""
        return self.forms.get(parameter, Form())

    @property
    def storages(self) -> dict[str, str]:
        """The storage of each parameter that is not dense."""
        return {name: form.storage for name, form in self.forms.items() if form.storage != DENSE.name}

    def store(self, parameters: Iterable[str], storage: str) -> Layout:
        """This layout with `parameters` in `storage`."""
        return self._with({name: replace(self.form(name), storage=storage) for name in parameters})

    def split(self, parameters: Iterable[str], split: Split) -> Layout:
        """This layout with one dimension of `parameters` spread over ranks."""
        old = {name: self.form(name) for name in parameters}
        return self._with({name: replace(form, splits=(*form.splits, split)) for name, form in old.items()})

    def add_once(self, parameters: Iterable[str], axis: str) -> Layout:
        """This layout with `parameters` added once to a sum over the ranks of an axis."""
        old = {name: self.form(name) for name in parameters}
        return self._with({name: replace(form, added=(*form.added, axis)) for name, form in old.items()})

    def over(self, mesh: Mesh) -> Layout:
        """This layout on the ranks of `mesh`."""
        return replace(self, mesh=mesh)

    def _with(self, forms: Mapping[str, Form]) -> Layout:
        return replace(self, forms={**self.forms, **forms})


def held_bytes(shape: Sequence[int], itemsize: int, form: Form, coordinate: Mapping[str, int]) -> int:
    """The bytes that the rank at a coordinate holds of a parameter whose dense shape is `shape`.

    Example:
        >>> held_bytes([6, 4], 2, Form(splits=(Split(0, "tp", (range(0, 4), range(4, 6))),)), {"tp": 1})
        16
    """
    index = form.index(coordinate)
    num_values = math.prod(len(index.get(dim, range(size))) for dim, size in enumerate(shape))
    return STORAGES[form.storage].num_bytes(num_values, itemsize)


def take(tensor: Tensor, index: Mapping[int, Part]) -> Tensor:
    """A slice of a tensor: the given indices of some dimensions. A view where they are ranges.

    Example:
        >>> take(torch.arange(6).view(2, 3), {0: (1,), 1: range(0, 2)})
        tensor([[3, 4]])
    """
    for dim, part in index.items():
        if isinstance(part, range):
            tensor = tensor.narrow(dim, part.start, len(part))
        else:
            tensor = tensor.index_select(dim, torch.tensor(part, device=tensor.device))
    return tensor


def stored_splits(form: Form) -> list[Split]:
    """The splits of a form as they fall in its stored tensors."""
    return [STORAGES[form.storage].split(split) for split in form.splits]

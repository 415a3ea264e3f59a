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

from .edit import Journal, Relayout, exchange


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


def from_model(model: nn.Module) -> Source:
    """The source that encodes the tensors a model has now."""

    def read(parameter: str, storage: Storage) -> Stored:
        return storage.encode(model.get_parameter(parameter).detach())

    return read


def execute(model: nn.Module, layout: Layout, source: Source | None, journal: Journal) -> None:
    """Bring the parameters of `model` into `layout`, from `source` or else from the tensors it has now.

    All are encoded before the first is exchanged.
    """
    read = source or from_model(model)
    # A source shows its own progress. A small model is done before the bar would show.
    bar = tqdm(layout.storages.items(), desc="packing", unit="tensor", delay=2, leave=False, disable=source is not None)
    stored = {parameter: read(parameter, STORAGES[storage]) for parameter, storage in bar}
    for parameter, storage in layout.storages.items():
        path, _, name = parameter.rpartition(".")
        old = model.get_parameter(parameter)
        edit = Relayout(path, name, storage, stored[parameter].sqnr, old.requires_grad, old)
        new = {f"{name}{suffix}": tensor for suffix, tensor in stored[parameter].tensors.items()}
        exchange(model.get_submodule(path), name, {key: nn.Parameter(t, requires_grad=False) for key, t in new.items()})
        journal.edits.append(edit)

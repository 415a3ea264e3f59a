"""Layout: how each parameter is stored. Wrappers edit it as data; one executor moves the bytes.

The bytes come from a source: the tensors that the model has now, or a checkpoint. So wrapping a model and loading one
are the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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


class Storage(Protocol):
    """A way to hold a parameter as one tensor or more, beside plain dense."""

    name: str
    suffixes: tuple[str, ...]

    def encode(self, dense: Tensor) -> Stored:
        """Dense values as this storage holds them."""
        ...

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
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


def execute(model: nn.Module, layout: Layout, source: Source, journal: Journal) -> None:
    """Bring the parameters of `model` into `layout`. All are encoded before the first is exchanged."""
    stored = {
        parameter: source(parameter, STORAGES[storage])
        for parameter, storage in _with_bar(layout.storages.items(), "packing")
    }
    for parameter, storage in layout.storages.items():
        path, _, name = parameter.rpartition(".")
        old = model.get_parameter(parameter)
        edit = Relayout(path, name, storage, stored[parameter].sqnr, old.requires_grad, old)
        new = {f"{name}{suffix}": tensor for suffix, tensor in stored[parameter].tensors.items()}
        exchange(model.get_submodule(path), name, {key: nn.Parameter(t, requires_grad=False) for key, t in new.items()})
        journal.edits.append(edit)


def _with_bar(items: Iterable[tuple[str, str]], what: str) -> Iterator[tuple[str, str]]:
    # Small models are done before it shows.
    yield from tqdm(list(items), desc=what, unit="tensor", delay=2, leave=False)

"""A weight and its low-rank change made one, slice by slice, in any storage, and how exact that is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..core import held_by, mesh_of
from ..distributed import local_part, sum_of_parts
from ..kernels import memory
from ..kernels.low_rank import LowRank
from ..kernels.mxfp4 import BLOCK
from ..layout import DENSE, MXFP4, STORAGES, Form, Held
from ..model.adapters import Place, adapter_parameters


@dataclass(frozen=True)
class Change:
    """What is added to a weight, as this rank holds it: the transpose of `scale * B A` for experts, else that."""

    place: Place
    low_rank: LowRank

    def __getitem__(self, index: int) -> Tensor:
        """The change of the weights of one expert, [in, out], or of the whole weight; float32 or float64."""
        return self.low_rank.expert(index).delta().mT if self.place.of_experts else self.low_rank.delta()


def refuse_fsdp(model: nn.Module) -> None:
    """Raise `ValueError` if parameters are cut otherwise than wrappers cut them: their parts do not belong together."""
    mesh = mesh_of(model)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and not (mesh is not None and mesh.holds(parameter)):
            raise ValueError(
                f"{name} is spread by FSDP, and nothing can be merged there. save_adapter(model, path), and "
                "load_adapter into a model that FSDP does not hold."
            )


def changes_of(model: nn.Module) -> dict[str, Change]:
    """The changes by adapters, by the name of the weight."""
    return {
        place.weight: Change(place, LowRank(local_part(a), local_part(b), adapter.scale))
        for place, adapter, a, b in adapter_parameters(model)
    }


@dataclass(frozen=True)
class Exactness:
    """How exact a weight is after its change was folded in. Sums of squares over all of it.

    Attributes:
        weight, weight_error: of the changed weight, and of what its storage missed.
        change, change_error: of the change, and of what of it did not arrive.
    """

    weight: float
    weight_error: float
    change: float
    change_error: float

    @property
    def sqnr(self) -> float:
        """The signal-to-quantisation-noise ratio of the changed weight, in dB."""
        return _decibels(self.weight, self.weight_error)

    @property
    def change_sqnr(self) -> float:
        """The same of the change alone: at 0 dB as much of it is missing as there is."""
        return _decibels(self.change, self.change_error)


def _decibels(signal: float, noise: float) -> float:
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


class Folded:
    """A weight as this rank holds it, with its change if it has one: what encoding reads slice by slice."""

    def __init__(self, model: nn.Module, name: str, change: Change | None) -> None:
        how = held_by(model).get(name, Held(Form()))
        self.parameter = model.get_parameter(how.names(name)[0])
        self.storage = how.form.storage
        self.tensors = {
            suffix: local_part(model.get_parameter(name + suffix)) for suffix in STORAGES[self.storage].suffixes
        }
        self.change = change
        packed = self.storage != DENSE.name
        self.dtype = how.form.dtype if packed else self.parameter.dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)
        first = next(iter(self.tensors.values()))
        self.device, self.of_experts = first.device, first.ndim > 2
        self.shape: tuple[int, ...] = first.shape
        if packed:
            self.shape = (len(first), *self._old(slice(0, 0)).shape[1:])

    def _old(self, which: slice) -> Tensor:
        some = {suffix: tensor[which] for suffix, tensor in self.tensors.items()}
        return STORAGES[self.storage].decode(some, self.wide)

    def old(self, index: int) -> Tensor:
        """The weights of one expert as they are, or all of a weight that is of none."""
        return self._old(slice(index, index + 1))[0] if self.of_experts else self.tensors[""].to(self.wide)

    def __getitem__(self, index: int, /) -> Tensor:
        """The changed weights of one expert, or all of a weight that is of none."""
        return self.old(index) if self.change is None else self.old(index) + self.change[index]

    def __len__(self) -> int:
        """How many slices there are."""
        return self.shape[0] if self.of_experts else 1

    def stored(self, storage: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """What this rank holds of the changed weight in a storage; dense in a dtype. As it is, if nothing changes."""
        if self.change is None and storage == self.storage:
            return {suffix: t.to(dtype) if storage == DENSE.name else t for suffix, t in self.tensors.items()}
        if storage != DENSE.name:
            encoded = dict(STORAGES[storage].encode(self).tensors)
            if storage == self.storage:
                self._keep_what_is_nearer(encoded)
            return encoded
        dense = memory.empty(self.shape, dtype, self.device)
        for index in range(len(self)):
            (dense[index] if self.of_experts else dense).copy_(self[index])
        return {"": dense}

    def _keep_what_is_nearer(self, encoded: Mapping[str, Tensor]) -> None:
        """Put blocks that as they were are as near to the changed values back, bit for bit: all that did not change."""
        assert self.storage == MXFP4.name
        for index in range(len(self)):
            wanted, new = self[index], {suffix: tensor[index : index + 1] for suffix, tensor in encoded.items()}
            decoded = STORAGES[self.storage].decode(new, self.wide)[0]
            before, after = (_error_by_block(some - wanted) for some in (self.old(index), decoded))
            for suffix, tensor in encoded.items():
                tensor[index][before <= after] = self.tensors[suffix][index][before <= after]

    def exactness(self, stored: Mapping[str, Tensor], storage: str) -> Exactness:
        """How exact the changed weight is as it was stored. On all ranks that hold a part of it."""
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        for index in range(len(self)):
            if self.of_experts:
                some = {suffix: tensor[index : index + 1] for suffix, tensor in stored.items()}
                new = STORAGES[storage].decode(some, self.wide)[0]
            else:
                new = stored[""]
            wanted, change = self[index], self[index] - self.old(index)
            error = new.to(self.wide) - wanted
            sums += torch.stack([part.square().sum(dtype=torch.float64) for part in (wanted, error, change, error)])
        return Exactness(*sum_of_parts(sums, self.parameter).tolist())


def _error_by_block(error: Tensor) -> Tensor:
    """The squares of an error [in, out], summed over each block of inputs: [out, in / 32]."""
    return cast(Tensor, error.mT.unflatten(-1, (-1, BLOCK)).square().sum(-1))

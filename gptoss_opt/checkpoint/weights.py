"""The weights of a model in a checkpoint: checked against what the model needs, and read straight to their place."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..kernels import memory
from ..kernels.mxfp4 import BLOCK
from ..layout import DENSE, MXFP4, STORAGES, Form, Part, Split, Stored
from .folder import Checkpoint
from .reader import CheckpointError

Index = Mapping[int, Part]
NOTHING: Index = {}


@dataclass(frozen=True)
class Weights:
    """The weights of a model in a checkpoint, checked against what the model needs. Reads nothing until asked to.

    Attributes:
        checkpoint: where they are.
        packed: the parameters that it holds as MXFP4.
        on_bytes: called with the number of bytes whenever some have been read.
    """

    checkpoint: Checkpoint
    packed: frozenset[str]
    on_bytes: Callable[[int], None] | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: nn.Module) -> Weights:
        """Raises `CheckpointError` if a tensor is missing, or has another shape or kind of dtype than `model` needs."""
        packed = frozenset(name for name, _ in model.named_parameters() if f"{name}_blocks" in checkpoint.tensors)
        needed = [need for name, p in model.named_parameters() for need in _needed(name, p, name in packed)]
        for key, shape, kind in needed:
            _check(checkpoint, key, shape, kind)
        keys = [key for key, _, _ in needed]
        tied = {"lm_head.weight"}
        if unknown := sorted(set(checkpoint.tensors) - set(keys) - tied):
            warnings.warn(
                f"{checkpoint.folder} holds {len(unknown)} tensors that the model has no place for, such as "
                f"{', '.join(unknown[:3])}: they are left out.",
                stacklevel=3,
            )
        return cls(checkpoint, packed)

    def num_bytes(self, forms: Mapping[str, Form], coordinate: Mapping[str, int]) -> int:
        """The bytes that the rank at a coordinate has to read of parameters in these forms."""
        total = 0
        for name, form in forms.items():
            shares = [len(form.index(coordinate)[split.dim]) / split.size for split in form.splits]
            suffixes = MXFP4.suffixes if name in self.packed else ("",)
            total += sum(round(self.checkpoint.tensors[name + s].num_bytes * math.prod(shares)) for s in suffixes)
        return total

    def read(self, key: str, index: Index = NOTHING) -> Tensor:
        """A tensor of the checkpoint, or a slice of it, in memory of its own."""
        info = self.checkpoint.tensors[key]
        shape = [len(index.get(dim, range(size))) for dim, size in enumerate(info.shape)]
        out = memory.empty(shape, info.dtype)
        for part, bounds in _runs(index, len(info.shape)):
            self.checkpoint.read(key, bounds, out=out[part], on_bytes=self.on_bytes)
        return out

    def stored(self, parameter: str, form: Form, index: Index, like: Tensor) -> Stored:
        """A slice of a parameter in the storage of a form, where `like` is: read as it is, packed, or dequantised."""
        storage = STORAGES[form.storage]
        if form.storage == DENSE.name:
            return Stored({"": self.dense(parameter, form, index, like)})
        if parameter in self.packed and form.storage == MXFP4.name:
            inside = _in_storage(form.splits, index)
            return Stored(
                {suffix: self.read(parameter + suffix, inside).to(like.device) for suffix in storage.suffixes}
            )
        return storage.encode(InFile(self, parameter, like.device, like.dtype, index))

    def dense(self, parameter: str, form: Form, index: Index, like: Tensor) -> Tensor:
        """A slice of a parameter in the dtype and on the device of `like`."""
        if parameter not in self.packed:
            return self.read(parameter, index).to(like.device, like.dtype)
        inside = _in_storage(form.splits, index)
        files = {s: InFile(self, parameter + s, like.device, torch.uint8, inside) for s in MXFP4.suffixes}
        return MXFP4.decode(files, like.dtype)


def _in_storage(splits: Iterable[Split], index: Index) -> Index:
    """Where a slice of a dense expert weight is in its blocks and scales."""
    moved = (MXFP4.split(replace(split, parts=(index[split.dim],))) for split in splits)
    return {split.dim: split.parts[0] for split in moved}


def _runs(index: Index, num_dims: int) -> Iterator[tuple[slice, tuple[slice, ...]]]:
    """A slice as parts that are contiguous along the first dimension: where each goes, and its bounds in the tensor."""
    rest = (index.get(dim, slice(None)) for dim in range(1, num_dims))
    bounds = tuple(slice(part.start, part.stop) for part in rest if isinstance(part, range | slice))
    assert len(bounds) == max(num_dims - 1, 0), "only the first dimension is spread otherwise than in ranges"
    first = index.get(0, slice(None))
    if isinstance(first, tuple):
        for place, number in enumerate(first):
            yield slice(place, place + 1), (slice(number, number + 1), *bounds)
    else:
        yield slice(None), (slice(first.start, first.stop), *bounds) if num_dims else ()


@dataclass(frozen=True)
class InFile:
    """A tensor, or a slice of it, that stays in its file, and is read along its first dimension one by one."""

    weights: Weights
    key: str
    device: torch.device
    dtype: torch.dtype
    index: Index = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the slice."""
        sizes = self.weights.checkpoint.tensors[self.key].shape
        return tuple(len(self.index.get(dim, range(size))) for dim, size in enumerate(sizes))

    def __getitem__(self, number: int, /) -> Tensor:
        inside = self.index.get(0, range(self.shape[0]))[number]
        part = self.weights.read(self.key, {**self.index, 0: range(inside, inside + 1)})
        return part[0].to(self.device, self.dtype)


def _needed(name: str, parameter: Tensor, packed: bool) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """The tensors that hold a parameter: key, shape and kind."""
    if not packed:
        yield name, tuple(parameter.shape), "floating point"
        return
    num_experts, num_in, num_out = parameter.shape
    scales = (num_experts, num_out, num_in // BLOCK)
    yield f"{name}_blocks", (*scales, BLOCK // 2), "uint8"
    yield f"{name}_scales", scales, "uint8"


def _check(checkpoint: Checkpoint, key: str, shape: tuple[int, ...], kind: str) -> None:
    if key not in checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.folder}: there is no tensor {key!r} among its {len(checkpoint.tensors)}, and the model of "
            "its config.json needs it. Download the checkpoint again, or mend its config."
        )
    info = checkpoint.tensors[key]
    if not (info.dtype == torch.uint8 if kind == "uint8" else info.dtype.is_floating_point):
        raise CheckpointError(
            f"{info}: is {info.dtype}, and should be {kind}. Download it again, or save the model again; a model that "
            "transformers dequantised saves dense weights under the names of packed ones."
        )
    if info.shape != shape:
        raise CheckpointError(
            f"{info}: has the shape {list(info.shape)}, and the model of config.json needs {list(shape)}. "
            "Give the config.json that belongs to these weights."
        )

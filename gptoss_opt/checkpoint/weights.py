"""The weights of a model in a checkpoint: checked against what the model needs, and read straight to their place."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import memory
from ..kernels.mxfp4 import BLOCK
from ..layout import DENSE, MXFP4, STORAGES, Form, Part, Stored
from .folder import Checkpoint
from .mapped import MappedFiles
from .reader import CheckpointError, TensorInfo

Index = Mapping[int, Part]


@dataclass(frozen=True)
class Weights:
    """The weights of a model in a checkpoint, checked against what the model needs: a source of layouts.

    Reads nothing until asked to.

    Attributes:
        checkpoint: where they are.
        model: what they are for.
        packed: the parameters that the checkpoint holds as MXFP4.
        bar: shows how many of their bytes have been read.
        mapped: where tensors are mapped that stay as they are in the files; None reads all.
    """

    checkpoint: Checkpoint
    model: nn.Module
    packed: frozenset[str]
    bar: Any = None
    mapped: MappedFiles | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: nn.Module) -> Weights:
        """Raises `CheckpointError` if a tensor is missing, or has another shape or kind of dtype than `model` needs."""
        experts = (name for name, parameter in model.named_parameters() if parameter.ndim == 3)
        packed = frozenset(name for name in experts if f"{name}_blocks" in checkpoint.tensors)
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
        return cls(checkpoint, model, packed)

    def expect(self, forms: Mapping[str, Form], coordinate: Mapping[str, int]) -> None:
        """Set the bar to the bytes that the rank at a coordinate has to read of parameters in these forms."""
        self.bar.total = 0
        for name, form in forms.items():
            shares = [len(form.index(coordinate)[split.dim]) / split.size for split in form.splits]
            suffixes = MXFP4.suffixes if name in self.packed else ("",)
            sizes = (self.checkpoint.tensors[name + suffix].num_bytes for suffix in suffixes)
            self.bar.total += sum(round(size * math.prod(shares)) for size in sizes)

    def read(self, key: str, index: Index) -> Tensor:
        """A tensor of the checkpoint, or a slice of it: mapped where that can be, else in memory of its own."""
        info = self.checkpoint.tensors[key]
        parts = _parts(info, index)
        mapped = None if self.mapped is None else self.mapped.tensor(info, parts)
        if mapped is not None:
            self.bar.update(mapped.nbytes)
            return mapped
        out = memory.empty([len(part) for part in parts], info.dtype)
        first, *rest = parts
        bounds = [slice(part.start, part.stop) for part in rest if isinstance(part, range)]
        assert len(bounds) == len(rest), "only the first dimension is spread otherwise than in ranges"
        runs = [first] if isinstance(first, range) else [range(number, number + 1) for number in first]
        begin = 0
        for run in runs:
            place = out[begin : begin + len(run)]
            self.checkpoint.read(key, (slice(run.start, run.stop), *bounds), out=place, on_bytes=self.bar.update)
            begin += len(run)
        return out

    def __call__(self, parameter: str, form: Form, index: Index) -> Stored:
        """A slice of a parameter in the storage of a form, where the model has it: as it is, packed, or dequantised."""
        like = self.model.get_parameter(parameter)
        if parameter not in self.packed:
            if form.storage == DENSE.name:
                return Stored({"": self.read(parameter, index).to(like.device, like.dtype)})
            return STORAGES[form.storage].encode(InFile(self, parameter, like.device, like.dtype, index))
        # Where a slice of the dense weights is in their blocks and scales.
        moved = [MXFP4.split(replace(split, parts=(index[split.dim],))) for split in form.splits]
        inside = {split.dim: split.parts[0] for split in moved}
        if form.storage == MXFP4.name:
            return Stored({s: self.read(parameter + s, inside).to(like.device) for s in MXFP4.suffixes})
        files = {s: InFile(self, parameter + s, like.device, torch.uint8, inside) for s in MXFP4.suffixes}
        return STORAGES[form.storage].encode(MXFP4.decode(files, like.dtype))


def _parts(info: TensorInfo, index: Index) -> list[Part]:
    return [index.get(dim, range(size)) for dim, size in enumerate(info.shape)]


@dataclass(frozen=True)
class InFile:
    """A tensor, or a slice of it, that stays in its file, and is read along its first dimension one by one."""

    weights: Weights
    key: str
    device: torch.device
    dtype: torch.dtype
    index: Index

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the slice."""
        return tuple(map(len, _parts(self.weights.checkpoint.tensors[self.key], self.index)))

    def __getitem__(self, number: int, /) -> Tensor:
        inside = self.index.get(0, range(self.shape[0]))[number]
        part = self.weights.read(self.key, {**self.index, 0: range(inside, inside + 1)})
        return part[0].to(self.device, self.dtype)


def _needed(name: str, parameter: Tensor, packed: bool) -> Iterator[tuple[str, tuple[int, ...], str]]:
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

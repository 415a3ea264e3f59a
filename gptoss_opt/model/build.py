"""Building a model without its weights, and reading these from a checkpoint straight to their place."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import GenerationConfig, GptOssForCausalLM

from ..core import DENSE, STORAGES, Form, Layout, Part, Split, Stored, exchange, held_by
from ..kernels import memory
from ..kernels.mxfp4 import BLOCK
from .checkpoint import Checkpoint, CheckpointError
from .experts import MXFP4, expert_parameters

Index = Mapping[int, Part]
NOTHING: Index = {}


def build(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> GptOssForCausalLM:
    """The model of a checkpoint, in eval mode, whose parameters have their shape, dtype and device, but no memory."""
    config = copy.deepcopy(checkpoint.config)
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        if method != "mxfp4":
            raise CheckpointError(
                f"{checkpoint.folder / 'config.json'}: quantization_config names the method {method!r}, and load reads "
                "MXFP4 and dense checkpoints. Load it with transformers, dequantise it, and save it."
            )
        del config.quantization_config
    # On the CPU, whatever torch.device(...) is in force.
    with torch.device("cpu"), init_empty_weights(include_buffers=False):
        model = cast(Any, GptOssForCausalLM)._from_config(config, dtype=dtype)
    for name, parameter in list(model.named_parameters()):
        path, _, last = name.rpartition(".")
        # One element seen from everywhere: it says where the weights will be, and takes no room there.
        room = torch.empty((), dtype=dtype, device=device).expand(parameter.shape)
        exchange(model.get_submodule(path), last, {last: nn.Parameter(room)})
    model.tie_weights()
    for module in model.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device)
    if (checkpoint.folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    model.name_or_path = config.name_or_path
    return cast(GptOssForCausalLM, model.eval())


@dataclass(frozen=True)
class Weights:
    """The weights of a model in a checkpoint, checked against what the model needs. Reads nothing until asked to."""

    checkpoint: Checkpoint
    parameters: tuple[str, ...]
    """All parameters of the model, as they are called when dense."""
    packed: frozenset[str]
    """Those that the checkpoint holds as MXFP4."""
    on_bytes: Callable[[int], None] | None = None
    """Called with the bytes read, as they come."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: nn.Module) -> Weights:
        """Raises `CheckpointError` if a tensor is missing, or has another shape or kind of dtype than `model` needs."""
        packed = frozenset(name for name in expert_parameters(model) if f"{name}_blocks" in checkpoint.tensors)
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
        names = tuple(name for name, _ in model.named_parameters())
        return cls(checkpoint, names, packed)

    def num_bytes(self, layout: Layout) -> int:
        """Of all that this rank needs."""
        coordinate, total = layout.mesh.coordinate if layout.mesh else {}, 0
        for name in self.parameters:
            form = layout.form(name)
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


def fill(model: nn.Module, weights: Weights) -> None:
    """Give every parameter that is still without memory its weights."""
    done = held_by(model)
    for name, parameter in list(model.named_parameters()):
        # What is laid out otherwise has its weights already.
        if name in weights.parameters and name not in done:
            path, _, last = name.rpartition(".")
            value = weights.dense(name, Form(), NOTHING, parameter)
            exchange(model.get_submodule(path), last, {last: nn.Parameter(value)})
    cast(Any, model).tie_weights()


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

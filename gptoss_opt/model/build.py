"""Building a model without its weights, and reading these from a checkpoint straight to their place."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import GenerationConfig, GptOssForCausalLM

from ..core import Storage, Stored
from ..core.layout import exchange
from ..kernels import memory
from ..kernels.mxfp4 import BLOCK
from .checkpoint import Checkpoint, CheckpointError
from .experts import MXFP4, expert_parameters


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
    num_bytes: int
    """Of all that the model needs."""
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
        return cls(checkpoint, names, packed, sum(checkpoint.tensors[key].num_bytes for key in keys))

    def read(self, key: str) -> Tensor:
        """A tensor of the checkpoint, in memory of its own."""
        info = self.checkpoint.tensors[key]
        return self.checkpoint.read(key, out=memory.empty(info.shape, info.dtype), on_bytes=self.on_bytes)

    def stored(self, parameter: str, storage: Storage, like: Tensor) -> Stored:
        """A parameter in `storage`, where `like` is: read as it is, or packed from dense."""
        if parameter in self.packed and storage.name == MXFP4.name:
            return Stored({suffix: self.read(parameter + suffix).to(like.device) for suffix in storage.suffixes})
        return storage.encode(InFile(self, parameter, like.device, like.dtype))

    def dense(self, parameter: str, like: Tensor) -> Tensor:
        """A parameter in the dtype and on the device of `like`."""
        if parameter not in self.packed:
            return self.read(parameter).to(like.device, like.dtype)
        tensors = {suffix: InFile(self, parameter + suffix, like.device, torch.uint8) for suffix in MXFP4.suffixes}
        return MXFP4.decode(tensors, like.dtype)


@dataclass(frozen=True)
class InFile:
    """A tensor that stays in its file, and is read slice by slice along its first dimension."""

    weights: Weights
    key: str
    device: torch.device
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.weights.checkpoint.tensors[self.key].shape

    def __getitem__(self, index: int, /) -> Tensor:
        part = self.weights.checkpoint.read(self.key, (slice(index, index + 1),), on_bytes=self.weights.on_bytes)
        return part[0].to(self.device, self.dtype)


def fill(model: nn.Module, weights: Weights) -> None:
    """Give every parameter that is still without memory its weights."""
    for name, parameter in list(model.named_parameters()):
        # What is laid out otherwise has its weights already, and other names.
        if name in weights.parameters:
            path, _, last = name.rpartition(".")
            exchange(model.get_submodule(path), last, {last: nn.Parameter(weights.dense(name, parameter))})
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

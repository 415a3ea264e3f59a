"""`load`: a model from a checkpoint with its wrappers, each byte read once and straight to its place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from tqdm.auto import tqdm
from transformers import GptOssForCausalLM, PreTrainedModel

from ..core import Stack, Wrapper, compose
from ..core.apply import apply
from ..core.resolve import confer
from ..model.build import GENERATION, build, read_generation_config
from .folder import CONFIG, Checkpoint
from .mapped import MappedFiles, watch
from .reader import CheckpointError
from .weights import Weights

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def load(
    path_or_id: str | os.PathLike[str],
    *wrappers: Wrapper | Stack,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
    memory_map: bool = False,
) -> GptOssForCausalLM:
    """Load a GPT-OSS checkpoint with its wrappers. Equal, bit for bit, to `from_pretrained` and then the wrappers.

    The model is built without memory and the stack is checked; then each tensor is read from its file straight to where
    it stays. What is packed in the checkpoint stays packed under `with_mxfp4_experts`, and is dequantised without it; a
    dense checkpoint is packed tensor by tensor. Above the finished model, memory holds one tensor at most.

    Args:
        path_or_id: a folder, or a name on the Hugging Face hub, such as "openai/gpt-oss-20b". The hub's cache is used,
            and offline (HF_HUB_OFFLINE=1) nothing else.
        *wrappers: wrappers and stacks, in any order.
        device: where the weights go; the CPU if it is left out.
        dtype: of all weights that are not packed: bfloat16, float32 or float64, also by name; "auto" is what
            config.json says, else what the first floating point tensor of the files is.
        memory_map: let weights that stay as they are in the files point into them, on a CPU: they are there at once,
            shared with other processes, and dropped instead of swapped where memory is short. The files must be left
            alone as long as the model is there; a forward after they were changed is a `CheckpointError`.

    Returns:
        The model, in eval mode: of the class that `architectures` in config.json names, by default GptOssForCausalLM.

    Raises:
        CheckpointError: a file is missing, damaged, or does not hold what the model needs. Names file and key.
        CompatibilityError: the wrappers cannot stand together, or not on this model.
        ValueError: another dtype, a device that is not there, or `memory_map` on one that is not a CPU.

    Example:
        >>> model = load(path, with_mxfp4_experts(), with_flash_attention())
        >>> stack_of(model)
        compose(with_mxfp4_experts(), with_flash_attention())
        >>> model.dtype
        torch.bfloat16
    """
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and named not in DTYPES:
        known = ", ".join(map(str, DTYPES))
        raise ValueError(f"load: dtype is {dtype}. Use one of {known}; float16 overflows. Or 'auto', or a name.")
    stack = compose(*wrappers)
    try:
        checkpoint = Checkpoint.open(path_or_id)
        _check_quantization(checkpoint)
        kind = _dtype_of(checkpoint) if dtype == "auto" else cast(torch.dtype, named)
        place = _usable("cpu" if device is None else device)
        if memory_map and place.type != "cpu":
            raise ValueError(f"load: memory_map=True points into files, and the weights go to {place}. Leave it out.")
        model = _built(checkpoint, place, kind)
        weights = replace(Weights.of(checkpoint, model), mapped=MappedFiles() if memory_map else None)
    except Exception as error:
        # The other processes are about to agree on the stack, and this one has no model to apply it to.
        confer(stack.wrappers, None, [f"{type(error).__name__}: {error}"])
        raise
    if weights.mapped is not None:
        watch(model, weights.mapped)
    with tqdm(desc="loading", unit="B", unit_scale=True, delay=1) as bar:
        apply(model, stack.wrappers, replace(weights, bar=bar))
    if weights.mapped is not None:
        weights.mapped.release()
    return cast(GptOssForCausalLM, model)


def _built(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    with _as_checkpoint_errors(checkpoint.folder / CONFIG):
        model = build(checkpoint.config, device, dtype)
    with _as_checkpoint_errors(checkpoint.folder / GENERATION):
        read_generation_config(checkpoint.folder, model)
    return model


@contextmanager
def _as_checkpoint_errors(file: Path) -> Iterator[None]:
    """Name the file in the errors of transformers, which may be any."""
    try:
        yield
    except Exception as error:
        problem = f"transformers cannot make anything of it ({type(error).__name__}: {error})"
        raise CheckpointError(f"{file}: {problem}. Correct it or download it again.") from error


def _check_quantization(checkpoint: Checkpoint) -> None:
    quantised = getattr(checkpoint.config, "quantization_config", None)
    method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    if quantised is not None and method != "mxfp4":
        raise CheckpointError(
            f"{checkpoint.folder / CONFIG}: quantization_config names the method {method!r}, and load reads "
            "MXFP4 and dense checkpoints. Load it with transformers, dequantise it, and save it."
        )


def _dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    """What `from_pretrained` takes for "auto"."""
    found = [info.dtype for info in checkpoint.tensors.values() if info.dtype.is_floating_point]
    said = getattr(checkpoint.config, "dtype", None) or next(iter(found), torch.bfloat16)
    dtype = getattr(torch, said, None) if isinstance(said, str) else said
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{checkpoint.folder}: its weights are {said}. Give load a dtype: {', '.join(map(str, DTYPES))}."
        )
    return cast(torch.dtype, dtype)


def _usable(device: torch.device | str | int) -> torch.device:
    try:
        return torch.empty((), device=device).device
    except (AssertionError, RuntimeError) as error:
        problem = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"load: no tensor can be made on the device {device!r} ({problem}). Use another.") from error

"""`load`: a model from a checkpoint with its wrappers, each byte read once and straight to its place."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from tqdm.auto import tqdm
from transformers import GptOssForCausalLM

from ..core import Stack, Wrapper, compose
from ..core.apply import apply
from ..core.resolve import confer
from ..model.build import build
from .folder import Checkpoint
from .reader import CheckpointError
from .weights import Weights

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def load(
    path_or_id: str | os.PathLike[str],
    *wrappers: Wrapper | Stack,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype = torch.bfloat16,
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
        dtype: of all weights that are not packed: bfloat16, float32 or float64.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: a file is missing, damaged, or does not hold what the model needs. Names file and key.
        CompatibilityError: the wrappers cannot stand together, or not on this model.
        ValueError: another dtype, or a device that is not there.

    Example:
        >>> model = load(path, with_mxfp4_experts(), with_flash_attention())
        >>> stack_of(model)
        compose(with_mxfp4_experts(), with_flash_attention())
        >>> model.dtype
        torch.bfloat16
    """
    if dtype not in DTYPES:
        raise ValueError(f"load: dtype is {dtype}. Use one of {', '.join(map(str, DTYPES))}; float16 overflows.")
    stack = compose(*wrappers)
    try:
        checkpoint = Checkpoint.open(path_or_id)
        _check_quantization(checkpoint)
        model = build(checkpoint.folder, checkpoint.config, _usable("cpu" if device is None else device), dtype)
        weights = Weights.of(checkpoint, model)
    except Exception as error:
        # The other processes are about to agree on the stack, and this one has no model to apply it to.
        confer(stack.wrappers, None, [f"{type(error).__name__}: {error}"])
        raise
    with tqdm(desc="loading", unit="B", unit_scale=True, delay=1) as bar:
        apply(model, stack.wrappers, replace(weights, bar=bar))
    return model


def _check_quantization(checkpoint: Checkpoint) -> None:
    quantised = getattr(checkpoint.config, "quantization_config", None)
    method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    if quantised is not None and method != "mxfp4":
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: quantization_config names the method {method!r}, and load reads "
            "MXFP4 and dense checkpoints. Load it with transformers, dequantise it, and save it."
        )


def _usable(device: torch.device | str | int) -> torch.device:
    try:
        return torch.empty((), device=device).device
    except (AssertionError, RuntimeError) as error:
        problem = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"load: no tensor can be made on the device {device!r} ({problem}). Use another.") from error

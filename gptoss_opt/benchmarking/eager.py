"""The model as transformers alone has it: what the wrappers are compared with."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.quantization_config import Mxfp4Config


def eager_model(path: str | os.PathLike[str], *, device: str = "cpu", dtype: str | torch.dtype = torch.bfloat16) -> Any:
    """A checkpoint as transformers loads it, in eager attention: packed experts are dequantised.

    Example:
        >>> eager_model(path).config._attn_implementation
        'eager'
    """
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
    if getattr(AutoConfig.from_pretrained(path), "quantization_config", None):
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    if device == "cuda":
        options["device_map"] = device
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    for parameter in model.parameters():
        # Expert weights: older versions leave dequantised ones in bfloat16, whatever is asked for.
        if parameter.ndim == 3:
            parameter.data = parameter.data.to(model.dtype)
    return model

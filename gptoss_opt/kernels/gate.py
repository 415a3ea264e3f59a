"""The gate of native code, which reads as far as sizes say, wherever that leads: all tensors go through it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .codes import Codes

PLAIN: tuple[type[Tensor], ...] = (Tensor, nn.Parameter, Codes)
"""The types of tensors that are what they seem; others stand for something else, such as a part of a DTensor."""


def plain(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor that lies in memory as it seems to. Raises `ValueError`, which names it, unless it does."""
    if type(tensor) not in PLAIN or tensor.layout != torch.strided or tensor.is_neg():
        kind = f"a {type(tensor).__name__}" if type(tensor) not in PLAIN else f"negated, or {tensor.layout}"
        raise ValueError(f"{name} is {kind}, whose memory native code cannot read. Hand it a plain, dense tensor.")
    return tensor


def admit(name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int], device: torch.device) -> Tensor:
    """Return a tensor whose values native code can read as they lie in memory.

    Raises `ValueError`, which names the tensor, unless it is plain, contiguous and has values, and is of this dtype,
    shape and device.

    Example:
        >>> admit("offsets", torch.zeros(4), torch.float32, (4,), torch.device("cpu")).shape
        torch.Size([4])
    """
    plain(name, tensor)
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{name} is {list(tensor.shape)}, and should be {list(shape)}.")
    if tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device}, and should be {dtype} on {device}: moved or cast after it "
            "was wrapped. Apply the wrapper again: it chooses anew."
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous, with strides {list(tensor.stride())}. Give {name}.contiguous().")
    if tensor.numel() and not tensor.data_ptr():
        raise ValueError(f"{name} has no values: its memory was given back, as FSDP does between forwards.")
    return tensor

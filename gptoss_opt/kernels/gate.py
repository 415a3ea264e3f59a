"""The gate of native code, which reads as far as sizes say, wherever that leads: all tensors go through it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .codes import Codes

PLAIN: tuple[type[Tensor], ...] = (Tensor, nn.Parameter, Codes)
"""The types of tensors that are what they seem; others stand for something else, such as a part of a DTensor."""


CPU = torch.device("cpu")


def admit(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    shape: Sequence[int],
    device: torch.device = CPU,
    *,
    strided: bool = True,
) -> Tensor:
    """Return a tensor whose values native code can read one after the other; a copy where they lie with gaps.

    Raises `ValueError`, which names the tensor, unless it is plain and has values, and is of this dtype, shape and
    device; where it must not be copied (`strided` is False), also if they lie with gaps.

    Example:
        >>> admit("offsets", torch.zeros(8)[::2], torch.float32, (4,)).stride()
        (1,)
    """
    if type(tensor) not in PLAIN or tensor.layout != torch.strided or tensor.is_neg():
        view = "a negated view" if tensor.is_neg() else f"in layout {tensor.layout}"
        kind = view if type(tensor) in PLAIN else f"a {type(tensor).__name__}"
        raise ValueError(f"{name} is {kind}, whose memory native code cannot read. Hand it a plain, dense tensor.")
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{name} is {list(tensor.shape)}, and should be {list(shape)}.")
    if tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device}, and should be {dtype} on {device}: moved or cast after it "
            "was wrapped. Apply the wrapper again: it chooses anew."
        )
    if tensor.numel() and not tensor.data_ptr():
        raise ValueError(f"{name} has no values: its memory was given back, as FSDP does between forwards.")
    if not strided and not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous, with strides {list(tensor.stride())}. Give {name}.contiguous().")
    return tensor.contiguous()

"""Packing and unpacking: by the native library where it can, else in plain torch. The bits are the same."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from . import format as plain


def pack(dense: Tensor) -> tuple[Tensor, Tensor]:
    """`format.pack`: rows [..., K] to blocks [..., K / 32, 16] and scales [..., K / 32]."""
    if native.why_not(dense.device.type, dense.dtype) is not None or dense.ndim == 0 or dense.shape[-1] % plain.BLOCK:
        return plain.pack(dense)
    shape = (*dense.shape[:-1], dense.shape[-1] // plain.BLOCK)
    blocks, scales = (torch.empty(size, dtype=torch.uint8) for size in ((*shape, plain.BLOCK // 2), shape))
    # What is not finite is refused in one place.
    return (blocks, scales) if native.pack(dense, blocks, scales) else plain.pack(dense)


def unpack(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`format.unpack`: blocks [..., K / 32, 16] and scales [..., K / 32] to values [..., K]."""
    if native.why_not(blocks.device.type, dtype) is not None:
        return plain.unpack(blocks, scales, dtype)
    plain.check_shapes(blocks, scales)
    return native.unpack(blocks, scales, torch.empty((*scales.shape[:-1], scales.shape[-1] * plain.BLOCK), dtype=dtype))

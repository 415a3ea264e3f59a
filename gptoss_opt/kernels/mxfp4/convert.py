"""Packing and unpacking: by the native library where it can, else in plain torch. The bits are the same."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..gate import admit
from . import format as plain


def pack(dense: Tensor) -> tuple[Tensor, Tensor]:
    """`format.pack`: rows [..., K] to blocks [..., K / 32, 16] and scales [..., K / 32]."""
    if native.why_not(dense.device.type, dense.dtype) is not None or dense.ndim == 0 or dense.shape[-1] % plain.BLOCK:
        return plain.pack(dense)
    functions, best, parallel = native.library()
    rows = admit("weights", dense.detach(), dense.dtype, dense.shape)
    shape = (*dense.shape[:-1], dense.shape[-1] // plain.BLOCK)
    blocks, scales = (torch.empty(size, dtype=torch.uint8) for size in ((*shape, plain.BLOCK // 2), shape))
    there = map(Tensor.data_ptr, (rows, blocks, scales))
    half, num_threads = rows.dtype == torch.bfloat16, torch.get_num_threads()
    failed = functions.gptoss_pack(best, half, *there, scales.numel(), parallel, num_threads)
    # What is not finite is refused in one place.
    return plain.pack(dense) if failed else (blocks, scales)


def unpack(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`format.unpack`: blocks [..., K / 32, 16] and scales [..., K / 32] to values [..., K]."""
    if native.why_not(blocks.device.type, dtype) is not None:
        return plain.unpack(blocks, scales, dtype)
    plain.check_shapes(blocks, scales)
    functions, _, parallel = native.library()
    blocks = admit("blocks", blocks, torch.uint8, blocks.shape)
    scales = admit("scales", scales, torch.uint8, scales.shape)
    dense = torch.empty((*scales.shape[:-1], scales.shape[-1] * plain.BLOCK), dtype=dtype)
    there, num_threads = map(Tensor.data_ptr, (blocks, scales, dense)), torch.get_num_threads()
    functions.gptoss_unpack(dtype == torch.bfloat16, *there, scales.numel(), parallel, num_threads)
    return dense

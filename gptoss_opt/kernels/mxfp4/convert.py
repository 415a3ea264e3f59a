"""Packing and unpacking: by the native library where it can, else in plain torch. The bits are the same."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..gate import admit
from . import format as plain

STRIP = 64
"""How many columns `pack_columns` gives a sum for: see format.h."""


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


def pack_columns(
    dense: Tensor, blocks: Tensor, scales: Tensor, *, instruction_set: int | None = None
) -> tuple[float, float]:
    """Quantise weights `[in, out]` along their first dimension, in one pass: `pack(dense.T)`.

    Args:
        dense: `[in, out]`, floating point, `in` a multiple of 32.
        blocks: uint8 `[out, in / 32, 16]`, contiguous, to write to.
        scales: uint8 `[out, in / 32]`, likewise.
        instruction_set: an index of `INSTRUCTION_SETS`, by default the best that this CPU has.

    Returns:
        The sum of the squares of all values, and that of their errors.

    Raises:
        ValueError: as `pack`.
    """
    num_in, num_out = dense.shape
    by_native = native.why_not(dense.device.type, dense.dtype) is None and num_in % plain.BLOCK == 0
    if by_native:
        functions, best, parallel = native.library()
        which = best if instruction_set is None else instruction_set
        values = admit("weights", dense.detach(), dense.dtype, dense.shape)
        shape = (num_out, num_in // plain.BLOCK)
        to = admit("blocks", blocks, torch.uint8, (*shape, plain.BLOCK // 2), strided=False)
        sums = torch.empty(-(-num_out // STRIP), 2, dtype=torch.float64)
        there = map(Tensor.data_ptr, (values, to, admit("scales", scales, torch.uint8, shape, strided=False), sums))
        half, num_threads = dense.dtype == torch.bfloat16, torch.get_num_threads()
        if not functions.gptoss_pack_columns(which, half, *there, num_in, num_out, parallel, num_threads):
            signal, noise = sums.sum(0).tolist()
            return signal, noise
    rows = dense.T
    found = plain.pack(rows)
    for name, to, packed in (("blocks", blocks, found[0]), ("scales", scales, found[1])):
        admit(name, to, torch.uint8, packed.shape, dense.device, strided=False).copy_(packed)
    exact = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
    error = exact - unpack(blocks, scales, exact.dtype)
    signal, noise = (float(x.square().sum(dtype=torch.float64)) for x in (exact, error))
    return signal, noise


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

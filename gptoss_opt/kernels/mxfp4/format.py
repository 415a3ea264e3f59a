"""Packing to MXFP4 and back, in plain torch: the semantics every kernel is held to.

Source of format and rounding: OCP Microscaling Formats (MX) Specification v1.0, sections 5.3.3, 5.4.1 and 6.3.

Legend: K values of a row, BLOCK = 32 of them to a scale, two to a byte (the first in the low four bits).
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
"""Values that share one scale: 16 bytes."""

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The value of each four-bit code (E2M1): sign, two bits of exponent, one of mantissa."""

BIAS = 127
"""A scale byte `s` (E8M0) stands for `2 ** (s - 127)`; 255 stands for NaN."""

MAX_EXPONENT = 2
"""The exponent of the largest four-bit float, 6 = 1.5 * 2 ** 2."""


def pack(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise rows to MXFP4, rounding to nearest, ties to even. Exact for values that came from MXFP4.

    The scale of a block is `2 ** (floor(log2(max |v|)) - 2)`, and values past the largest float are clamped to it
    (OCP MX v1.0, section 6.3). The sign of zero is kept.

    Args:
        dense: `[..., K]`, floating point, K a multiple of 32.

    Returns:
        blocks: uint8 `[..., K / 32, 16]`.
        scales: uint8 `[..., K / 32]`.

    Raises:
        ValueError: K is not a multiple of 32, or a value is infinite or NaN, which MXFP4 cannot hold.

    Example:
        >>> blocks, scales = pack(torch.arange(32.0) / 4)
        >>> blocks.shape, scales.item() - 127
        (torch.Size([1, 16]), 0)
        >>> unpack(blocks, scales)[:8]
        tensor([0.0000, 0.0000, 0.5000, 1.0000, 1.0000, 1.0000, 1.5000, 2.0000])
    """
    if not dense.is_floating_point():
        raise ValueError(f"pack takes floating point values, not {dense.dtype}.")
    if dense.ndim == 0 or dense.shape[-1] % BLOCK:
        raise ValueError(f"pack takes rows of a multiple of {BLOCK} values, not {list(dense.shape)}.")
    values = dense.detach().unflatten(-1, (-1, BLOCK))
    values = values if values.dtype == torch.float64 else values.float()
    largest = values.abs().amax(-1)
    if not bool(largest.isfinite().all()):
        raise ValueError("the weights hold an infinity or a NaN, which MXFP4 cannot hold. Mend them before packing.")
    # frexp gives a mantissa in [0.5, 1): its exponent is one more than floor(log2). The byte of a block of zeros is 0.
    exponent = torch.frexp(largest).exponent - 1 - MAX_EXPONENT
    scales = (torch.where(largest > 0, exponent, -BIAS) + BIAS).clamp(0, 254)
    # In two steps, each a normal power of two: one would overflow at either end.
    half = (BIAS - scales) // 2
    magnitude = _ldexp(_ldexp(values.abs(), half), BIAS - scales - half)
    # The distance between neighbours is 0.5 below 2, 1 below 4, and 2 above; torch.round rounds ties to even.
    low, middle = magnitude < 2, magnitude < 4
    code = torch.where(
        low, (magnitude * 2).round(), torch.where(middle, magnitude.round() + 2, (magnitude / 2).round() + 4)
    )
    code = code.clamp(max=7).to(torch.uint8) | (values.signbit().to(torch.uint8) << 3)
    return code[..., 0::2] | (code[..., 1::2] << 4), scales.to(torch.uint8)


def unpack(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of packed rows: `FP4_VALUES[code] * 2 ** (scale - 127)`.

    Args:
        blocks: uint8 `[..., K / 32, 16]`.
        scales: uint8 `[..., K / 32]`. The scale 255 is honoured: its 32 values are NaN.
        dtype: of the result. bfloat16, float32 and float64 hold every value below their largest exactly.

    Returns:
        `[..., K]`.

    Raises:
        ValueError: the shapes do not belong together.

    Example:
        >>> unpack(torch.full((1, 16), 0x72, dtype=torch.uint8), torch.tensor([128], dtype=torch.uint8))[:4]
        tensor([ 2., 12.,  2., 12.])
    """
    check_shapes(blocks, scales)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    table = torch.tensor(FP4_VALUES, dtype=wide, device=blocks.device)
    values = table[torch.stack((blocks & 15, blocks >> 4), -1).int()].flatten(-2)
    exponent = scales.int() - BIAS
    half = exponent // 2
    values = _ldexp(_ldexp(values, half), exponent - half)
    return values.masked_fill((scales == 255)[..., None], float("nan")).flatten(-2).to(dtype)


def check_shapes(blocks: Tensor, scales: Tensor) -> None:
    """Raise `ValueError` unless these are the blocks and the scales of the same rows."""
    if blocks.shape[:-1] != scales.shape or blocks.shape[-1:] != (BLOCK // 2,):
        raise ValueError(
            f"blocks {list(blocks.shape)} and scales {list(scales.shape)} do not belong together: "
            f"expected [..., K / {BLOCK}, {BLOCK // 2}] and [..., K / {BLOCK}]."
        )


def _ldexp(values: Tensor, exponent: Tensor) -> Tensor:
    """`values [..., 32] * 2 ** exponent [...]`, exactly."""
    return values * torch.exp2(exponent.to(values.dtype))[..., None]


def sqnr(dense: Tensor, quantised: Tensor) -> float:
    """The signal-to-quantisation-noise ratio in dB, `10 log10(sum v**2 / sum (v - q)**2)`; infinite where exact.

    Example:
        >>> sqnr(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.9]))  # doctest: +ELLIPSIS
        23.01...
    """
    signal = dense.double().square().sum()
    noise = (dense.double() - quantised.double()).square().sum()
    return float("inf") if noise == 0 else float(10 * torch.log10(signal / noise))

"""Products of rows, sorted by expert, with weights packed as MXFP4, on CUDA through Triton.

Nothing here waits for the GPU: the launch grids follow from shapes, and each program finds its expert on the device, so
CUDA graphs can capture a call.

Legend: N rows, sorted by expert; E experts; O output and K input features of one projection; I = O / 2.
"""

from __future__ import annotations

import importlib.util
from importlib import metadata
from types import ModuleType
from typing import NamedTuple

import torch
from packaging.version import Version
from torch import Tensor

from ..mxfp4 import BLOCK

OLDEST_TRITON = "3.2"
OLDEST_CAPABILITY = (8, 0)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Tile(NamedTuple):
    """What one program computes: `rows` x `out` of the result, `depth` (a multiple of 32) terms of the sum a step.

    For the gradient of the input the roles of `out` and `depth` change: `rows` x `depth`, and `out` terms a step.
    """

    rows: int
    out: int
    depth: int
    num_warps: int
    num_stages: int


# (rows per expert up to which it serves, tile), from arithmetic; a measurement on a GPU is still to be made.
#
# Each weight is read once per row tile of its expert, half a byte of it, and costs 2 operations per row. A GPU that
# does 990 Tflop/s in bfloat16 and reads 3.35 TB/s is bound by memory below about 80 rows per expert. There the least
# rows a tensor core takes (16) waste nothing, and what counts is many bytes under way: wide steps, several stages, and
# small tiles of features, so that even four experts fill the GPU. Above, row tiles of 64 and more reuse what was
# decoded, and the feature tile grows so that rows are read less often.
TILES = (
    (16, Tile(rows=16, out=64, depth=256, num_warps=4, num_stages=4)),
    (32, Tile(rows=32, out=64, depth=256, num_warps=4, num_stages=3)),
    (96, Tile(rows=64, out=128, depth=128, num_warps=8, num_stages=3)),
    (None, Tile(rows=128, out=128, depth=64, num_warps=8, num_stages=4)),
)
# The sum over `out` runs in short steps: [out, depth] decoded weights pass through shared memory.
BACKWARD_TILES = (
    (16, Tile(rows=16, out=64, depth=128, num_warps=4, num_stages=4)),
    (96, Tile(rows=64, out=64, depth=128, num_warps=4, num_stages=3)),
    (None, Tile(rows=128, out=64, depth=128, num_warps=8, num_stages=3)),
)
# Exact float32 products have no tensor cores: small tiles keep the operands in registers.
FLOAT32_TILE = Tile(rows=16, out=32, depth=64, num_warps=4, num_stages=2)

# From this many rows per expert on, the weights are dequantised to a dense temporary and multiplied by torch's grouped
# product. Also from arithmetic: writing and reading 2 bytes a weight takes 1.3 ps of a 3.35 TB/s memory, as long as the
# products of about 670 rows at 1 Pflop/s; what it buys is a product without decoding, which is some share of that.
DENSE_ROWS_PER_EXPERT = 1024

GROUP = 8
"""Row tiles that go over all feature tiles together: the weights of the one or two experts they have stay in L2."""
SCALES_PER_PROGRAM = 64
PAIRS_PER_PROGRAM = 1024


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """The reason why these kernels cannot serve, or None.

    Args:
        device_type: of the model, "cuda" for one.
        dtype: of the activations.

    Example:
        >>> why_not("cpu", torch.bfloat16)
        'needs CUDA, and the model is on cpu'
    """
    if device_type != "cuda":
        return f"needs CUDA, and the model is on {device_type}"
    if torch.version.hip:
        return "relies on bfloat16 subnormals, which have not been tried on ROCm"
    if dtype not in DTYPES:
        return f"takes {', '.join(map(str, DTYPES))}, and the model is in {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < OLDEST_CAPABILITY:
        return "needs a GPU of compute capability {}.{} or newer".format(*OLDEST_CAPABILITY)
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        # Nightly builds of torch bring it along under a name of their own, and newer than the oldest that will do.
        return None
    if Version(version) < Version(OLDEST_TRITON):
        return f"needs triton {OLDEST_TRITON} or newer, not {version}"
    return None


def forward(x: Tensor, ends: Tensor, blocks: Tensor, scales: Tensor) -> Tensor:
    """Each row times the transposed weights of its expert: `y[n] = x[n] @ W[expert of n].T`, summed in float32.

    A weight is `FP4_VALUES[code] * 2 ** (scale - 127)` in the dtype of x: exact in bfloat16 and float32, rounded where
    it is subnormal in float16, infinite where it is too large. The scale 255 makes NaN.

    Args:
        x: bfloat16, float16 or float32 `[N, K]`, rows sorted by expert.
        ends: int32 `[E]`, where the rows of each expert end, ascending, at most N. Rows from the last end on belong to
            no expert: their result is zero.
        blocks: uint8 `[E, O, K / 32, 16]`.
        scales: uint8 `[E, O, K / 32]`.

    Returns:
        `[N, O]`, in x's dtype.
    """
    num_experts, out_features, _ = _check(x, ends, blocks, scales, dim=2)
    if _goes_dense(x, num_experts, out_features):
        return _grouped(x, unpack(blocks, scales, x.dtype).transpose(1, 2), ends)
    y = x.new_empty(len(x), out_features)
    tile = _tile(TILES, x, num_experts)
    _launch("forward_kernel", tile, _cdiv(out_features, tile.out), x, ends, blocks, scales, y)
    return y


def backward_input(dy: Tensor, ends: Tensor, blocks: Tensor, scales: Tensor) -> Tensor:
    """The gradient of `forward` for its rows: `dx[n] = dy[n] @ W[expert of n]`, summed in float32.

    Args:
        dy: bfloat16, float16 or float32 `[N, O]`.
        ends, blocks, scales: as `forward` got them.

    Returns:
        `[N, K]`, in dy's dtype; zero for rows of no expert.
    """
    num_experts, out_features, num_scales = _check(dy, ends, blocks, scales, dim=1)
    if _goes_dense(dy, num_experts, out_features):
        return _grouped(dy, unpack(blocks, scales, dy.dtype), ends)
    dx = dy.new_empty(len(dy), num_scales * BLOCK)
    tile = _tile(BACKWARD_TILES, dy, num_experts)
    _launch("backward_input_kernel", tile, _cdiv(num_scales * BLOCK, tile.depth), dy, ends, blocks, scales, dx)
    return dx


def unpack(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The dense weights, exactly as `mxfp4.unpack` gives them.

    Args:
        blocks: uint8 `[E, O, K / 32, 16]`.
        scales: uint8 `[E, O, K / 32]`.
        dtype: bfloat16, float16 or float32.

    Returns:
        `[E, O, K]`.
    """
    dense = torch.empty(*scales.shape[:-1], scales.shape[-1] * BLOCK, dtype=dtype, device=blocks.device)
    if dense.numel():
        grid = (_cdiv(scales.numel(), SCALES_PER_PROGRAM),)
        with torch.cuda.device_of(blocks):
            _kernels().unpack_kernel[grid](_words(blocks), scales, dense, scales.numel(), BLOCK_G=SCALES_PER_PROGRAM)
    return dense


def swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """The clamped SwiGLU of GPT-OSS, `(up + 1) * gate * sigmoid(alpha * gate)`, computed in float32.

    Args:
        gate_up: `[N, 2 I]`, gate in the even columns and up in the odd ones, bias included.
        alpha: slope of the sigmoid.
        limit: gate is at most this, and up between it and its negative.

    Returns:
        `[N, I]`, in gate_up's dtype.
    """
    assert gate_up.is_contiguous()
    h = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    if h.numel():
        grid = (_cdiv(h.numel(), PAIRS_PER_PROGRAM),)
        with torch.cuda.device_of(gate_up):
            _kernels().swiglu_kernel[grid](gate_up, h, h.numel(), float(alpha), float(limit), BLOCK=PAIRS_PER_PROGRAM)
    return h


def swiglu_backward(dh: Tensor, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """The gradient of `swiglu` for gate_up; zero where a clamp is active, and not where a value equals its limit.

    Args:
        dh: `[N, I]`.
        gate_up, alpha, limit: as `swiglu` got them.

    Returns:
        `[N, 2 I]`, in gate_up's dtype.
    """
    assert gate_up.is_contiguous()
    assert gate_up.numel() == 2 * dh.numel()
    dh, d_gate_up = dh.contiguous(), torch.empty_like(gate_up)
    if dh.numel():
        grid = (_cdiv(dh.numel(), PAIRS_PER_PROGRAM),)
        with torch.cuda.device_of(gate_up):
            _kernels().swiglu_backward_kernel[grid](
                dh, gate_up, d_gate_up, dh.numel(), float(alpha), float(limit), BLOCK=PAIRS_PER_PROGRAM
            )
    return d_gate_up


def _kernels() -> ModuleType:
    """The Triton kernels, imported where they first run."""
    from . import triton_kernels

    return triton_kernels


def _check(rows: Tensor, ends: Tensor, blocks: Tensor, scales: Tensor, *, dim: int) -> tuple[int, int, int]:
    """E, O and K / 32, after asserting that everything fits; `dim` is what of the weights the rows are summed over."""
    num_experts, out_features, num_scales = scales.shape
    assert blocks.shape == (*scales.shape, BLOCK // 2), (blocks.shape, scales.shape)
    assert rows.shape[1:] == ((num_experts, out_features, num_scales * BLOCK)[dim],), (rows.shape, scales.shape)
    assert ends.shape == (num_experts,), (ends.shape, scales.shape)
    assert (rows.dtype in DTYPES, ends.dtype, blocks.dtype, scales.dtype) == (True, torch.int32, *2 * [torch.uint8])
    # A copy of the weights on every call would hide what packing is for.
    assert all(x.is_contiguous() for x in (ends, blocks, scales))
    return num_experts, out_features, num_scales


def _words(blocks: Tensor) -> Tensor:
    """Packed bytes as 32-bit words, without a copy."""
    return blocks.view(torch.int32)


def _tile(tiles: tuple[tuple[int | None, Tile], ...], rows: Tensor, num_experts: int) -> Tile:
    if rows.dtype == torch.float32:
        return FLOAT32_TILE
    per_expert = len(rows) / max(1, num_experts)
    return next(tile for most, tile in tiles if most is None or per_expert <= most)


def _launch(
    name: str,
    tile: Tile,
    num_feature_tiles: int,
    rows: Tensor,
    ends: Tensor,
    blocks: Tensor,
    scales: Tensor,
    out: Tensor,
) -> None:
    num_experts, out_features, num_scales = scales.shape
    if not out.numel():
        return
    if not scales.numel():
        out.zero_()
        return
    # The rows of no expert are one group more. A group of n rows has at most (n + rows - 1) // rows tiles.
    groups = min(num_experts + 1, len(rows))
    num_row_tiles = (len(rows) + groups * (tile.rows - 1)) // tile.rows
    with torch.cuda.device_of(rows):
        getattr(_kernels(), name)[(num_row_tiles * num_feature_tiles,)](
            rows.contiguous(),
            ends,
            _words(blocks),
            scales,
            out,
            len(rows),
            num_experts,
            out_features,
            num_scales,
            BLOCK_N=tile.rows,
            BLOCK_O=tile.out,
            BLOCK_K=tile.depth,
            BLOCK_E=1 << num_experts.bit_length(),
            GROUP=GROUP,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def _goes_dense(rows: Tensor, num_experts: int, out_features: int) -> bool:
    """Whether torch's grouped product takes these rows, and there are enough of them."""
    if rows.dtype != torch.bfloat16 or out_features % 8 or len(rows) < DENSE_ROWS_PER_EXPERT * max(1, num_experts):
        return False
    # On other GPUs it goes expert by expert, and waits for the GPU to learn their ends.
    return rows.is_cuda and torch.cuda.get_device_capability(rows.device)[0] in (9, 10)


def _grouped(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows times the dense weights of their expert, `[N, A]` x `[E, A, B]`; zero for rows of no expert."""
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    out: Tensor = grouped_mm(rows.contiguous(), weights, offs=ends)
    # The product leaves the rows of no expert as it found them in memory.
    orphans = torch.arange(len(rows), device=rows.device) >= ends[-1]
    return out.masked_fill_(orphans[:, None], 0)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)

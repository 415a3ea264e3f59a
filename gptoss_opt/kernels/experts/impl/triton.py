"""Products of rows, sorted by expert, with weights packed as MXFP4, on CUDA through Triton.

Nothing here waits for the GPU: the launch grids follow from shapes, and each program finds its expert on the device, so
CUDA graphs can capture a call.

Legend: N rows, sorted by expert; E experts; O output and K input features of one projection; I = O / 2.
"""

from __future__ import annotations

from functools import cache, partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ...gate import admit
from ...mxfp4 import BLOCK
from ...tracing import needs_operator
from ...triton import DTYPES, why_not
from ..clamp import edge
from ..fused_cuda import fused
from ..grouped import why_grouped_waits
from ..routes import add_bias
from ..weights import ExpertsRequest, ExpertWeights, Fused, PackedWeights


class TileConfig(NamedTuple):
    """What one program computes: `rows` x `out` of the result, `depth` (a multiple of 32) terms of the sum a step.

    For the gradient of the input the roles of `out` and `depth` change: `rows` x `depth`, and `out` terms a step.
    """

    rows: int
    out: int
    depth: int
    num_warps: int
    num_stages: int


# (rows per expert up to which it serves, tile): the fastest of about 30 on an H100, of gate and up of the 20b.
#
# Each weight is read once per row tile of its expert, half a byte of it, and costs 2 operations per row. A GPU that
# does 990 Tflop/s in bfloat16 and reads 3.35 TB/s is bound by memory below about 80 rows per expert. There the least
# rows a tensor core takes (16) waste nothing, and what counts is many bytes under way. Above, row tiles of 64 and more
# reuse what was decoded.
#
# Four warps are as many as this product may have on Hopper. With eight, one half of them runs ahead of the other, and
# its copies overwrite rows that the other's tensor cores still read: Triton (3.6) waits for a warp's own products only.
FORWARD_WARPS = 4
TILES = (
    (16, TileConfig(rows=16, out=64, depth=128, num_warps=FORWARD_WARPS, num_stages=5)),
    (32, TileConfig(rows=32, out=64, depth=128, num_warps=FORWARD_WARPS, num_stages=4)),
    (64, TileConfig(rows=64, out=128, depth=64, num_warps=FORWARD_WARPS, num_stages=4)),
    (None, TileConfig(rows=128, out=64, depth=64, num_warps=FORWARD_WARPS, num_stages=4)),
)
# The sum over `out` runs in short steps: [out, depth] decoded weights pass through shared memory.
BACKWARD_TILES = (
    (16, TileConfig(rows=16, out=64, depth=64, num_warps=4, num_stages=5)),
    (None, TileConfig(rows=64, out=64, depth=128, num_warps=4, num_stages=3)),
)
# Exact float32 products have no tensor cores: small tiles keep the operands in registers.
FLOAT32_TILE = TileConfig(rows=16, out=32, depth=64, num_warps=4, num_stages=2)

# From this many rows per expert on, the weights are dequantised to a dense temporary and multiplied by torch's grouped
# product: on an H100 both took as long there, between 256 and 1,024 rows, at which they were timed.
DENSE_ROWS_PER_EXPERT = 640
BACKWARD_DENSE_ROWS_PER_EXPERT = 384

GROUP = 8
"""Row tiles that go over all feature tiles together: the weights of the one or two experts they have stay in L2."""
SCALES_PER_PROGRAM = 64
PAIRS_PER_PROGRAM = 1024


class Triton:
    """Packed weights, decoded in registers, or for many rows dequantised to a temporary; on CUDA.

    A weight is `FP4_VALUES[code] * 2 ** (scale - 127)` in the dtype of the rows: exact in bfloat16 and float32, rounded
    where it is subnormal in float16, infinite where it is too large. The scale 255 makes NaN. Sums are in float32.
    """

    name = "triton"
    only_named = False

    def why_not(self, request: ExpertsRequest) -> str | None:
        """The reason why it cannot serve, or None."""
        return why_not(request.device_type, request.dtype)

    def fused_for(self, x: Tensor, indices: Tensor, weights: ExpertWeights) -> Fused | None:
        """All in a few launches."""
        return partial(fused, self._product) if indices.numel() else None

    def as_operator(self, x: Tensor, weights: PackedWeights) -> bool:
        return needs_operator(x, *weights.tensors, weights.bias)

    def why_waits(self, dtype: torch.dtype, device: torch.device) -> str | None:
        return None

    def forward(self, x: Tensor, offsets: Tensor, weights: PackedWeights) -> Tensor:
        y = self._product(x, offsets, weights)
        return y if weights.bias is None else add_bias(y, offsets, weights.bias)

    def _product(self, x: Tensor, offsets: Tensor, weights: PackedWeights) -> Tensor:
        """The same without the bias."""
        _check(x, offsets, weights, dim=1)
        num_experts, _, out_features = weights.shape
        if _goes_dense(x, num_experts, out_features, DENSE_ROWS_PER_EXPERT):
            return _grouped(x, unpack(weights.blocks, weights.scales, x.dtype).transpose(1, 2), offsets)
        y = x.new_empty(len(x), out_features)
        tile = _tile(TILES, x, num_experts)
        _launch("forward_kernel", tile, _cdiv(out_features, tile.out), x, offsets, weights, y)
        return y

    def backward(self, d_y: Tensor, offsets: Tensor, weights: PackedWeights) -> Tensor:
        _check(d_y, offsets, weights, dim=2)
        num_experts, in_features, out_features = weights.shape
        if _goes_dense(d_y, num_experts, out_features, BACKWARD_DENSE_ROWS_PER_EXPERT):
            return _grouped(d_y, unpack(weights.blocks, weights.scales, d_y.dtype), offsets)
        d_x = d_y.new_empty(len(d_y), in_features)
        tile = _tile(BACKWARD_TILES, d_y, num_experts)
        _launch("backward_input_kernel", tile, _cdiv(in_features, tile.depth), d_y, offsets, weights, d_x)
        return d_x

    def swiglu(self, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        """In one pass, in float32 inside."""
        h = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        _activate("swiglu_kernel", alpha, limit, gate_up, h)
        return h

    def swiglu_backward(self, d_h: Tensor, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        assert gate_up.numel() == 2 * d_h.numel()
        d_gate_up = torch.empty_like(gate_up)
        _activate("swiglu_backward_kernel", alpha, edge(limit), d_h.contiguous(), gate_up, d_gate_up)
        return d_gate_up


TRITON = Triton()


def unpack(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The dense weights `[E, O, K]`, exactly as `mxfp4.unpack` gives them; bfloat16, float16 or float32."""
    admit("blocks", blocks, torch.uint8, (*scales.shape, BLOCK // 2), blocks.device, strided=False)
    admit("scales", scales, torch.uint8, scales.shape, blocks.device, strided=False)
    dense = torch.empty(*scales.shape[:-1], scales.shape[-1] * BLOCK, dtype=dtype, device=blocks.device)
    if dense.numel():
        grid = (_cdiv(scales.numel(), SCALES_PER_PROGRAM),)
        with torch.cuda.device_of(blocks):
            words = blocks.view(torch.int32)
            _kernels().unpack_kernel[grid](words, scales, dense, scales.numel(), BLOCK_G=SCALES_PER_PROGRAM)
    return dense


@cache
def _kernels() -> ModuleType:
    from . import triton_kernels

    return triton_kernels


def _check(rows: Tensor, offsets: Tensor, weights: PackedWeights, *, dim: int) -> None:
    """Raise `ValueError` unless everything fits; `dim` is what of the weights the rows are summed over."""
    if rows.dtype not in DTYPES:
        raise ValueError(f"rows are {rows.dtype}. Use one of {', '.join(map(str, DTYPES))}.")
    blocks, device = (*weights.scales.shape, BLOCK // 2), rows.device
    admit("rows", rows, rows.dtype, (len(rows), weights.shape[dim]), device)
    admit("offsets", offsets, torch.int32, weights.shape[:1], device, strided=False)
    # A copy of the weights on every call would hide what packing is for.
    admit("blocks", weights.blocks, torch.uint8, blocks, device, strided=False)
    admit("scales", weights.scales, torch.uint8, blocks[:-1], device, strided=False)


def _tile(tiles: tuple[tuple[int | None, TileConfig], ...], rows: Tensor, num_experts: int) -> TileConfig:
    if rows.dtype == torch.float32:
        return FLOAT32_TILE
    per_expert = len(rows) / max(1, num_experts)
    return next(tile for max_rows, tile in tiles if max_rows is None or per_expert <= max_rows)


def _launch(
    name: str,
    tile: TileConfig,
    num_feature_tiles: int,
    rows: Tensor,
    offsets: Tensor,
    weights: PackedWeights,
    out: Tensor,
) -> None:
    num_experts, out_features, num_scales = weights.scales.shape
    if not out.numel():
        return
    if not weights.scales.numel():
        out.zero_()
        return
    # The rows of no expert are one group more. A group of n rows has at most (n + rows - 1) // rows tiles.
    groups = min(num_experts + 1, len(rows))
    num_row_tiles = (len(rows) + groups * (tile.rows - 1)) // tile.rows
    with torch.cuda.device_of(rows):
        getattr(_kernels(), name)[(num_row_tiles * num_feature_tiles,)](
            rows.contiguous(),
            offsets,
            weights.blocks.view(torch.int32),
            weights.scales,
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


def _activate(name: str, alpha: float, limit: float, *tensors: Tensor) -> None:
    for tensor in tensors:
        admit("gate_up or its gradient", tensor, tensors[0].dtype, tensor.shape, tensors[0].device, strided=False)
    pairs = min(tensor.numel() for tensor in tensors)
    if pairs:
        with torch.cuda.device_of(tensors[0]):
            kernel = getattr(_kernels(), name)[(_cdiv(pairs, PAIRS_PER_PROGRAM),)]
            kernel(*tensors, pairs, float(alpha), float(limit), BLOCK=PAIRS_PER_PROGRAM)


def _goes_dense(rows: Tensor, num_experts: int, out_features: int, per_expert: int) -> bool:
    """Whether torch's grouped product takes these rows, and there are enough of them."""
    if rows.dtype != torch.bfloat16 or out_features % 8 or len(rows) < per_expert * max(1, num_experts):
        return False
    return rows.is_cuda and why_grouped_waits(rows.dtype, rows.device) is None


def _grouped(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Rows times the dense weights of their expert, `[N, A]` x `[E, A, B]`; zero for rows of no expert."""
    out = functional.grouped_mm(rows.contiguous(), weights, offs=offsets)
    # The product leaves the rows of no expert as it found them in memory.
    orphans = torch.arange(len(rows), device=rows.device) >= offsets[-1]
    return out.masked_fill_(orphans[:, None], 0)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)

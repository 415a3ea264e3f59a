"""Products with expert weights, and the activation, by the native library, on CPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...gate import admit
from ...kernel_table import DENSE_EXPERTS, PACKED_EXPERTS, is_ever_native, kernel_for
from ...mxfp4 import BLOCK, unpack
from ...native import BFLOAT16, DTYPES, INSTRUCTION_SETS, TILE_ROWS, Matrices, check_memory, library, why_not
from ...processor import processor
from ...tracing import needs_operator
from .. import one_by_one
from ..clamp import edge
from ..weights import DenseWeights, ExpertsRequest, ExpertWeights, Fused, PackedWeights


class Native:
    """Packed weights, decoded in registers; bfloat16 or float32, sums in float32.

    Where torch's products were measured to be faster (`kernel_table.py`), each expert is decoded for them as a whole.
    `instruction_set` is an index of `INSTRUCTION_SETS`, by default the best that this CPU has.
    """

    name = "native"
    only_named = False

    def why_not(self, request: ExpertsRequest) -> str | None:
        """The reason why it cannot serve, or None."""
        return why_not(request.device_type, request.dtype)

    def fused_for(self, x: Tensor, indices: Tensor, weights: ExpertWeights) -> Fused | None:
        """All in one call, but where torch's products are faster."""
        return None if _is_torchs(indices.numel(), weights, x.dtype) else self.fused

    def fused(
        self,
        x: Tensor,
        indices: Tensor,
        routing_weights: Tensor,
        gate_up: ExpertWeights,
        down: ExpertWeights,
        alpha: float,
        limit: float,
        *,
        instruction_set: int | None = None,
    ) -> Tensor:
        """See `experts` of this package."""
        functions, best, parallel = library()
        which = best if instruction_set is None else instruction_set
        dtype = _dtype(x, gate_up, down, which=which)
        num_experts, hidden, pairs = gate_up.shape
        routes = (len(x), indices.shape[-1])
        rows = admit("x", x.to(dtype), dtype, (len(x), hidden))
        indices = admit("indices", indices.to(torch.int64), torch.int64, routes)
        # To the dtype of x first: as where gradients are asked for.
        routing_weights = admit("routing_weights", routing_weights.to(x.dtype).float(), torch.float32, routes)
        out = torch.empty_like(rows)
        status = functions.gptoss_experts(
            which if dtype == torch.bfloat16 else min(which, BFLOAT16 - 1),
            *map(Tensor.data_ptr, (rows, indices, routing_weights)),
            _matrices("gate_up", gate_up, gate_up.bias, dtype, gate_up.shape),
            _matrices("down", down, down.bias, dtype, (num_experts, pairs // 2, hidden)),
            out.data_ptr(),
            *routes,
            num_experts,
            alpha,
            limit,
            parallel,
            torch.get_num_threads(),
        )
        _check(status)
        return out.to(x.dtype)

    def as_operator(self, x: Tensor, weights: ExpertWeights) -> bool:
        return needs_operator(x, *weights.tensors, weights.bias)

    def why_waits(self, dtype: torch.dtype, device: torch.device) -> str | None:
        return f"the native library computes on a CPU, not on {device.type}"

    def forward(
        self, x: Tensor, offsets: Tensor, weights: ExpertWeights, *, instruction_set: int | None = None
    ) -> Tensor:
        return _product(x, offsets, weights, False, instruction_set)

    def backward(
        self, d_y: Tensor, offsets: Tensor, weights: ExpertWeights, *, instruction_set: int | None = None
    ) -> Tensor:
        return _product(d_y, offsets, weights, True, instruction_set)

    def swiglu(self, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        """In one pass, in float32 inside; bfloat16 or float32."""
        gate_up = gate_up.contiguous()
        return _activate(gate_up, None, gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2), alpha, limit)

    def swiglu_backward(self, d_h: Tensor, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        gate_up = gate_up.contiguous()
        return _activate(gate_up, d_h.contiguous(), torch.empty_like(gate_up), alpha, edge(limit))


class NativeDense(Native):
    """Dense weights, in bfloat16 on a CPU that multiplies it and on which that was measured to be faster than torch."""

    def why_not(self, request: ExpertsRequest) -> str | None:
        """The reason why it cannot serve, or None."""
        if reason := why_not(request.device_type, request.dtype):
            return reason
        best = library().best
        if request.dtype != torch.bfloat16 or best < BFLOAT16:
            which = f"in bfloat16 on {INSTRUCTION_SETS[BFLOAT16]}"
            return f"takes dense weights {which}; this is {request.dtype} on {INSTRUCTION_SETS[best]}"
        if odd := [size for size in request.sizes if size % BLOCK]:
            return f"takes dense weights of sizes that are multiples of {BLOCK}, not {odd[0]}"
        if not is_ever_native(DENSE_EXPERTS, request.dtype):
            return f"was not measured to be faster than torch on {processor()}, {INSTRUCTION_SETS[best]}"
        return None


NATIVE, NATIVE_DENSE = Native(), NativeDense()


def _dtype(x: Tensor, *projections: ExpertWeights, which: int) -> torch.dtype:
    """What is multiplied for rows of `x`. Only the last of the instruction sets multiply bfloat16."""
    if x.dtype not in DTYPES or x.device.type != "cpu":
        problem = f"the native library {why_not(x.device.type, x.dtype)}"
        raise ValueError(f"{problem}: moved or cast after it was wrapped. Apply the wrapper again: it chooses anew.")
    for weights in projections:
        dense = isinstance(weights, DenseWeights)
        values = weights.weight if isinstance(weights, DenseWeights) else weights.blocks
        wanted = torch.bfloat16 if dense else torch.uint8
        if values.device.type != "cpu" or values.dtype != wanted:
            raise ValueError(
                f"the native library takes {wanted} weights on cpu, and these are {values.dtype} on {values.device}: "
                "moved or cast after they were wrapped. Apply the wrapper again: it chooses anew."
            )
        if dense and (which < BFLOAT16 or x.dtype != torch.bfloat16):
            raise ValueError(
                f"the native library multiplies dense weights in bfloat16 on {INSTRUCTION_SETS[BFLOAT16]}, not rows of "
                f"{x.dtype} on {INSTRUCTION_SETS[which]}. Apply the wrapper again: it chooses anew."
            )
    return x.dtype if which >= BFLOAT16 else torch.float32


def _is_torchs(num_rows: int, weights: ExpertWeights, dtype: torch.dtype) -> bool:
    """Whether torch's products were measured to be faster, for so many rows of all experts."""
    projection = DENSE_EXPERTS if isinstance(weights, DenseWeights) else PACKED_EXPERTS
    return kernel_for(projection, dtype, num_rows / max(weights.shape[0], 1)) == "torch"


class _Unpacked(PackedWeights):
    """Packed weights whose experts are decoded natively."""

    def expert(self, index: int, like: Tensor) -> Tensor:
        return unpack(self.blocks[index], self.scales[index], like.dtype).T


def torchs_product(x: Tensor, offsets: Tensor, weights: ExpertWeights, *, backward: bool = False) -> Tensor:
    """The product by torch's own, one expert after the other, each decoded natively if it is packed."""
    if isinstance(weights, PackedWeights):
        weights = _Unpacked(weights.blocks, weights.scales, weights.bias)
    return (one_by_one.input_gradient if backward else one_by_one.product)(x, offsets, weights)


def _check(status: int) -> None:
    assert status != -2, "dense weights are checked before"
    check_memory(status)


def _matrices(
    name: str, weights: ExpertWeights, bias: Tensor | None, dtype: torch.dtype, shape: Sequence[int]
) -> Matrices:
    if tuple(weights.shape) != tuple(shape):
        raise ValueError(f"{name} is {list(weights.shape)}, and should be {list(shape)}.")
    num_experts, length, rows = shape
    if isinstance(weights, DenseWeights):
        rows, length = length, rows
        named = [(name, weights.weight, dtype, tuple(shape))]
    else:
        blocks = (num_experts, rows, length // BLOCK)
        named = [(f"{name}_blocks", weights.blocks, torch.uint8, (*blocks, BLOCK // 2))]
        named += [(f"{name}_scales", weights.scales, torch.uint8, blocks)]
    if bias is not None:
        named += [(f"{name}_bias", bias.to(dtype), dtype, (num_experts, shape[2]))]
    tensors = tuple([admit(*one) for one in named])
    there = [tensor.data_ptr() for tensor in tensors]
    values, scales = there[0], None if isinstance(weights, DenseWeights) else there[1]
    matrices = Matrices(values, scales, None if bias is None else there[-1], rows, length)
    matrices.tensors = tensors
    return matrices


def _product(x: Tensor, offsets: Tensor, weights: ExpertWeights, backward: bool, which: int | None) -> Tensor:
    """`x` [N, in] times the weights plus the bias; or with `backward`, `x` [N, out] times the transposed weights."""
    functions, best, parallel = library()
    chosen, which = which is not None, best if which is None else which
    dtype = _dtype(x, weights, which=which)
    if not chosen and _is_torchs(len(x), weights, x.dtype):
        return torchs_product(x, offsets, weights, backward=backward)
    num_experts, width, out_width = weights.shape
    if backward:
        width, out_width = out_width, width
    half, packed = dtype == torch.bfloat16, not isinstance(weights, DenseWeights)
    rows = admit("rows", x.to(dtype), dtype, (len(x), width))
    offsets = admit("offsets", offsets, torch.int32, (num_experts,))
    matrices = _matrices("weights", weights, None if backward else weights.bias, dtype, weights.shape)
    y = rows.new_empty(x.shape[0], out_width)
    y[int(offsets[-1]) :] = 0
    columns, by_tiles = packed == backward, INSTRUCTION_SETS[which] == "AMX"
    room = None
    if half and not columns and (packed or by_tiles):  # the library puts rows in another order, with tiles that overlap
        room = rows.new_empty(len(rows) + (TILE_ROWS * num_experts if by_tiles else 0), width)
    status = functions.gptoss_product(
        which if half else min(which, BFLOAT16 - 1),
        columns,
        *map(Tensor.data_ptr, (rows, y, offsets)),
        matrices,
        None if room is None else room.data_ptr(),
        offsets.numel(),
        parallel,
        torch.get_num_threads(),
    )
    _check(status)
    return y.to(x.dtype)


def _activate(gate_up: Tensor, d_h: Tensor | None, to: Tensor, alpha: float, limit: float) -> Tensor:
    functions, best, parallel = library()
    gate_up = admit("gate_up", gate_up, gate_up.dtype, gate_up.shape)
    d_h = d_h if d_h is None else admit("d_h", d_h, gate_up.dtype, (len(gate_up), gate_up.shape[1] // 2))
    functions.gptoss_swiglu(
        best,
        gate_up.dtype == torch.bfloat16,
        gate_up.data_ptr(),
        None if d_h is None else d_h.data_ptr(),
        to.data_ptr(),
        gate_up.numel() // 2,
        alpha,
        limit,
        parallel,
        torch.get_num_threads(),
    )
    return to

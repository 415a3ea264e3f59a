"""Products with expert weights, and the activation, by the native library."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..mxfp4 import BLOCK
from ..native import BFLOAT16, DTYPES, INSTRUCTION_SETS, instruction_set, library, why_not
from .weights import Dense, Packed


class Matrices(NamedTuple):
    """Weights as the library takes them: `[E, rows, length]`, dense bfloat16, or packed if there are scales."""

    values: Tensor
    scales: Tensor | None
    rows: int
    length: int


def _packed(weights: Packed) -> Matrices:
    _, num_out, num_blocks = weights.scales.shape
    return Matrices(weights.blocks.contiguous(), weights.scales.contiguous(), num_out, num_blocks * BLOCK)


def _dense(weights: Dense) -> Matrices:
    return Matrices(weights.weight.contiguous(), None, *weights.weight.shape[1:])


def _product(
    x: Tensor, ends: Tensor, weights: Matrices, bias: Tensor | None, columns: bool, which: int | None = None
) -> Tensor:
    """`x` [N, length] times the transposed weights, or with `columns` [N, rows] times the weights, plus the bias."""
    if x.dtype not in DTYPES or x.device.type != "cpu":
        problem = f"the native library {why_not(x.device.type, x.dtype)}"
        raise ValueError(f"{problem}: moved or cast after it was wrapped. Undo the wrapper, and wrap the model again.")
    if weights.values.device.type != "cpu" or (weights.scales is None and weights.values.dtype != x.dtype):
        raise ValueError(
            f"the weights are {weights.values.dtype} on {weights.values.device}, and the rows {x.dtype} on cpu."
        )
    functions, best, parallel = library()
    which = best if which is None else which
    # Only the last of the instruction sets multiplies bfloat16; the others take float32.
    half = x.dtype == torch.bfloat16 and which == BFLOAT16
    which = which if half else min(which, BFLOAT16 - 1)
    dtype = torch.bfloat16 if half else torch.float32
    rows = x.to(dtype).contiguous()
    bias = None if bias is None else bias.to(dtype).contiguous()
    y = rows.new_empty(x.shape[0], weights.length if columns else weights.rows)
    y[int(ends[-1]) :] = 0
    room = torch.empty_like(rows) if half and weights.scales is not None and not columns else None
    status = functions.gptoss_product(
        which,
        columns,
        rows.data_ptr(),
        y.data_ptr(),
        ends.contiguous().data_ptr(),
        weights.values.data_ptr(),
        None if weights.scales is None else weights.scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if room is None else room.data_ptr(),
        ends.numel(),
        weights.rows,
        weights.length,
        parallel,
        torch.get_num_threads(),
    )
    if status:
        raise MemoryError("the native kernel found no memory for its scratch space.")
    return y.to(x.dtype)


def forward(x: Tensor, ends: Tensor, weights: Packed, *, instruction_set: int | None = None) -> Tensor:
    """`x` [N, in] times the weights of each row's expert, plus its bias: [N, out]. Rows of no expert give zero."""
    return _product(x, ends, _packed(weights), weights.bias, False, instruction_set)


def backward(d_y: Tensor, ends: Tensor, weights: Packed, *, instruction_set: int | None = None) -> Tensor:
    """The gradient [N, in] for `x` of `d_y` [N, out]."""
    return _product(d_y, ends, _packed(weights), None, True, instruction_set)


def why_not_dense(device_type: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> str | None:
    """The reason why it cannot multiply with dense weights of these sizes, or None."""
    if reason := why_not(device_type, dtype):
        return reason
    if dtype != torch.bfloat16 or library().best != BFLOAT16:
        return (
            f"takes dense weights in bfloat16 on {INSTRUCTION_SETS[BFLOAT16]}; this is {dtype} on {instruction_set()}"
        )
    if odd := [size for size in sizes if size % BLOCK]:
        return f"takes dense weights of sizes that are multiples of {BLOCK}, not {odd[0]}"
    return None


def dense_forward(x: Tensor, ends: Tensor, weights: Dense) -> Tensor:
    """`forward` with dense weights."""
    return _product(x, ends, _dense(weights), weights.bias, True)


def dense_backward(d_y: Tensor, ends: Tensor, weights: Dense) -> Tensor:
    """`backward` with dense weights."""
    return _product(d_y, ends, _dense(weights), None, False)


def _activate(gate_up: Tensor, d_out: Tensor | None, to: Tensor, alpha: float, limit: float) -> Tensor:
    functions, best, parallel = library()
    functions.gptoss_swiglu(
        best,
        gate_up.dtype == torch.bfloat16,
        gate_up.data_ptr(),
        None if d_out is None else d_out.data_ptr(),
        to.data_ptr(),
        gate_up.numel() // 2,
        alpha,
        limit,
        parallel,
        torch.get_num_threads(),
    )
    return to


def swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """`activation.swiglu` in one pass, in float32 inside; bfloat16 or float32."""
    gate_up = gate_up.contiguous()
    return _activate(gate_up, None, gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2), alpha, limit)


def swiglu_backward(d_out: Tensor, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """`activation.swiglu_backward` in one pass."""
    gate_up = gate_up.contiguous()
    return _activate(gate_up, d_out.contiguous(), torch.empty_like(gate_up), alpha, limit)

"""Products with expert weights, and the activation, by the native library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..mxfp4 import BLOCK
from ..native import BFLOAT16, DTYPES, INSTRUCTION_SETS, Matrices, instruction_set, library, why_not
from .weights import Dense, Packed, Weights


class Projection(NamedTuple):
    """Weights as the library takes them: `[E, rows, length]`, dense bfloat16, or packed if there are scales."""

    values: Tensor
    scales: Tensor | None
    bias: Tensor | None
    rows: int
    length: int

    @classmethod
    def of(cls, weights: Weights) -> Projection:
        """Those of dense or packed weights."""
        if isinstance(weights, Dense):
            return cls(weights.weight.contiguous(), None, weights.bias, *weights.weight.shape[1:])
        _, num_out, num_blocks = weights.scales.shape
        return cls(weights.blocks.contiguous(), weights.scales.contiguous(), weights.bias, num_out, num_blocks * BLOCK)

    def matrices(self, dtype: torch.dtype) -> tuple[Matrices, Tensor | None]:
        """Their addresses, and the bias in `dtype`, which must outlive them."""
        bias = None if self.bias is None else self.bias.to(dtype).contiguous()
        tensors = (self.values, self.scales, bias)
        return Matrices(*(None if t is None else t.data_ptr() for t in tensors), self.rows, self.length), bias


def _dtype(x: Tensor, *projections: Projection, which: int) -> torch.dtype:
    """What is multiplied for rows of `x`. Only the last of the instruction sets multiplies bfloat16."""
    if x.dtype not in DTYPES or x.device.type != "cpu":
        problem = f"the native library {why_not(x.device.type, x.dtype)}"
        raise ValueError(f"{problem}: moved or cast after it was wrapped. Apply the wrapper again: it chooses anew.")
    for weights in projections:
        values, wanted = weights.values, torch.bfloat16 if weights.scales is None else torch.uint8
        if values.device.type != "cpu" or values.dtype != wanted:
            raise ValueError(
                f"the native library takes {wanted} weights on cpu, and these are {values.dtype} on {values.device}: "
                "moved or cast after they were wrapped. Apply the wrapper again: it chooses anew."
            )
        if weights.scales is None and (which != BFLOAT16 or x.dtype != torch.bfloat16):
            raise ValueError(
                f"the native library multiplies dense weights in bfloat16 on {INSTRUCTION_SETS[BFLOAT16]}, not rows of "
                f"{x.dtype} on {INSTRUCTION_SETS[which]}. Apply the wrapper again: it chooses anew."
            )
    return x.dtype if which == BFLOAT16 else torch.float32


def _check(status: int) -> None:
    assert status != -2, "dense weights are checked before"
    if status:
        raise MemoryError("the native kernel found no memory for its scratch space.")


def _check_sizes(**sizes: tuple[Sequence[int], Sequence[int]]) -> None:
    """Raise `ValueError` unless each first shape is the second: what is behind an address cannot be looked up later."""
    for name, (found, wanted) in sizes.items():
        if tuple(found) != tuple(wanted):
            raise ValueError(f"{name} is {list(found)}, and should be {list(wanted)}.")


def _product(x: Tensor, ends: Tensor, weights: Projection, columns: bool, which: int | None = None) -> Tensor:
    """`x` [N, length] times the transposed weights, or with `columns` [N, rows] times the weights, plus the bias."""
    functions, best, parallel = library()
    which = best if which is None else which
    dtype = _dtype(x, weights, which=which)
    width, num_experts = (weights.rows if columns else weights.length), weights.values.shape[0]
    _check_sizes(rows=(x.shape, (len(x), width)), ends=(ends.shape, (num_experts,)))
    rows, half = x.to(dtype).contiguous(), dtype == torch.bfloat16
    matrices, _bias = weights.matrices(dtype)
    y = rows.new_empty(x.shape[0], weights.length if columns else weights.rows)
    y[int(ends[-1]) :] = 0
    room = torch.empty_like(rows) if half and weights.scales is not None and not columns else None
    status = functions.gptoss_product(
        which if half else min(which, BFLOAT16 - 1),
        columns,
        rows.data_ptr(),
        y.data_ptr(),
        ends.contiguous().data_ptr(),
        matrices,
        None if room is None else room.data_ptr(),
        ends.numel(),
        parallel,
        torch.get_num_threads(),
    )
    _check(status)
    return y.to(x.dtype)


def experts(
    x: Tensor,
    indices: Tensor,
    routing: Tensor,
    gate_up: Weights,
    down: Weights,
    alpha: float,
    limit: float,
    *,
    instruction_set: int | None = None,
) -> Tensor:
    """The whole layer in one call, without gradients: see `experts` of this package. In bfloat16 or float32."""
    functions, best, parallel = library()
    which = best if instruction_set is None else instruction_set
    both = Projection.of(gate_up), Projection.of(down)
    dtype = _dtype(x, *both, which=which)
    # Dense weights are [E, in, out], and packed ones [E, out, in].
    (hidden, pairs), (inner, out_size) = ((w.rows, w.length) if w.scales is None else (w.length, w.rows) for w in both)
    tokens, num_experts = len(x), both[0].values.shape[0]
    _check_sizes(
        x=(x.shape, (tokens, hidden)),
        indices=(indices.shape, (tokens, indices.shape[-1])),
        routing=(routing.shape, indices.shape),
        down=((both[1].values.shape[0], inner, out_size), (num_experts, pairs // 2, hidden)),
    )
    rows, indices = x.to(dtype).contiguous(), indices.to(torch.int64).contiguous()
    # To the dtype of x first: as where gradients are asked for.
    routing = routing.to(x.dtype).to(torch.float32).contiguous()
    out = torch.empty_like(rows)
    (first, _bias), (second, _other) = (projection.matrices(dtype) for projection in both)
    status = functions.gptoss_experts(
        which if dtype == torch.bfloat16 else min(which, BFLOAT16 - 1),
        rows.data_ptr(),
        indices.data_ptr(),
        routing.data_ptr(),
        first,
        second,
        out.data_ptr(),
        *indices.shape,
        num_experts,
        alpha,
        limit,
        parallel,
        torch.get_num_threads(),
    )
    _check(status)
    return out.to(x.dtype)


def forward(x: Tensor, ends: Tensor, weights: Packed, *, instruction_set: int | None = None) -> Tensor:
    """`x` [N, in] times the weights of each row's expert, plus its bias: [N, out]. Rows of no expert give zero."""
    return _product(x, ends, Projection.of(weights), False, instruction_set)


def backward(d_y: Tensor, ends: Tensor, weights: Packed, *, instruction_set: int | None = None) -> Tensor:
    """The gradient [N, in] for `x` of `d_y` [N, out]."""
    return _product(d_y, ends, Projection.of(weights)._replace(bias=None), True, instruction_set)


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
    return _product(x, ends, Projection.of(weights), True)


def dense_backward(d_y: Tensor, ends: Tensor, weights: Dense) -> Tensor:
    """`backward` with dense weights."""
    return _product(d_y, ends, Projection.of(weights)._replace(bias=None), False)


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

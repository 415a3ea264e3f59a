# mypy: disable-error-code="no-untyped-def"
"""Triton kernels for what lies around the experts' products. Imported only where they run.

Legend: T tokens, K experts per token, N = T * K rows, sorted by expert; E experts.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def clamped_swiglu(gate, up, alpha, limit):
    """`(up + 1) * gate * sigmoid(alpha * gate)` of values in float32, clamped first."""
    # Comparisons, and not minimum and maximum, keep a NaN.
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return (up + 1.0) * gate * tl.sigmoid(alpha * gate)


@triton.jit
def _keys(indices_ptr, first, num_routes, num_experts, BLOCK: tl.constexpr):
    """BLOCK routes from `first` on, their experts (E for one that is not here), and which of them there are."""
    route = first + tl.arange(0, BLOCK)
    there = route < num_routes
    key = tl.load(indices_ptr + route, mask=there, other=0)
    return route, tl.where((key >= 0) & (key < num_experts), key, num_experts).to(tl.int32), there


@triton.jit(do_not_specialize=["num_routes", "num_steps"])
def route_kernel(
    indices_ptr, order_ptr, inverse_ptr, offsets_ptr, num_routes, num_steps, num_experts, BLOCK: tl.constexpr
):
    """`Routes.of`: program e finds the rows of expert e, and the last one those of no expert here."""
    mine = tl.program_id(0)
    row = tl.zeros((), tl.int32)
    for step in range(num_steps):
        _, key, there = _keys(indices_ptr, step * BLOCK, num_routes, num_experts, BLOCK)
        row += tl.sum(((key < mine) & there).to(tl.int32), 0)
    for step in range(num_steps):
        route, key, there = _keys(indices_ptr, step * BLOCK, num_routes, num_experts, BLOCK)
        is_mine = ((key == mine) & there).to(tl.int32)
        rows = row + tl.cumsum(is_mine, 0) - 1
        tl.store(order_ptr + rows, route.to(tl.int64), mask=is_mine != 0)
        tl.store(inverse_ptr + route, rows.to(tl.int64), mask=is_mine != 0)
        row += tl.sum(is_mine, 0)
    tl.store(offsets_ptr + mine, row, mask=mine < num_experts)


@triton.jit
def bias_and_swiglu_kernel(
    gate_up_ptr,
    bias_ptr,
    offsets_ptr,
    h_ptr,
    num_experts,
    num_pairs,
    alpha,
    limit,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """`h = swiglu(gate_up + bias)` of BLOCK pairs of one row, in float32. Rows of no expert stay as they were."""
    row = tl.program_id(0)
    group = tl.arange(0, BLOCK_E)
    ends = tl.load(offsets_ptr + group, mask=group < num_experts, other=2147483647)
    expert = tl.sum((ends <= row).to(tl.int32), 0)
    if expert >= num_experts:
        return
    first, left = tl.program_id(1) * BLOCK, num_pairs - tl.program_id(1) * BLOCK
    value = tl.arange(0, BLOCK * 2)
    at = row.to(tl.int64) * num_pairs * 2 + first * 2 + value
    both = tl.load(gate_up_ptr + at, mask=value < left * 2, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias_at = expert.to(tl.int64) * num_pairs * 2 + first * 2 + value
        both += tl.load(bias_ptr + bias_at, mask=value < left * 2, other=0.0).to(tl.float32)
    gate, up = tl.split(tl.reshape(both, (BLOCK, 2)))
    h = clamped_swiglu(gate, up, alpha, limit)
    index = tl.arange(0, BLOCK)
    h_at = row.to(tl.int64) * num_pairs + first + index
    tl.store(h_ptr + h_at, h.to(h_ptr.dtype.element_ty), mask=index < left)


@triton.jit
def combine_kernel(
    y_ptr,
    bias_ptr,
    indices_ptr,
    inverse_ptr,
    weights_ptr,
    out_ptr,
    num_experts,
    num_values,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`out[t] = sum over k of weight[t, k] * (y + bias)` of each route's row: BLOCK values of one token, in float32."""
    token = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    value = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        route = token * TOP_K + k
        expert = tl.load(indices_ptr + route).to(tl.int64)
        known = (expert >= 0) & (expert < num_experts) & (value < num_values)
        row = tl.load(inverse_ptr + route)
        y = tl.load(y_ptr + row * num_values + value, mask=known, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + expert * num_values + value, mask=known, other=0.0).to(tl.float32)
        # To the dtype of the rows first: as where gradients are asked for.
        weight = tl.load(weights_ptr + route).to(dtype).to(tl.float32)
        total += tl.where(known, weight * y, 0.0)
    tl.store(out_ptr + token * num_values + value, total.to(dtype), mask=value < num_values)

# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel for attention on pages. Imported only where it runs.

Legend: R decoding sequences, H query heads, N key/value heads, D head dim, Z parts of the keys of a sequence.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    block_table_ptr,
    context_starts_ptr,
    context_lens_ptr,
    sums_ptr,
    largest_ptr,
    totals_ptr,
    width,
    num_kv_heads,
    num_parts,
    window,
    scale,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One part of the keys of one sequence, for the query heads of one key/value head: the sum of values by their
    weights, the largest logit, and the total of the weights. HEADS and DIMS are GROUP and DIM as wide as a tile."""
    row, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length, oldest = tl.load(context_lens_ptr + row), tl.load(context_starts_ptr + row)
    oldest = tl.maximum(oldest, tl.where(window > 0, length - window, 0))
    each = tl.cdiv(tl.cdiv(length - oldest, num_parts), KEYS) * KEYS
    begin = oldest + part * each
    end = tl.minimum(begin + each, length)

    head, dim = tl.arange(0, HEADS), tl.arange(0, DIMS)
    real = (head[:, None] < GROUP) & (dim[None, :] < DIM)
    first_head = (row * num_kv_heads + kv_head) * GROUP
    q = tl.load(q_ptr + (first_head + head[:, None]) * DIM + dim[None, :], mask=real, other=0.0)
    largest = tl.full((HEADS,), float("-inf"), tl.float32)
    totals = tl.zeros((HEADS,), tl.float32)
    sums = tl.zeros((HEADS, DIMS), tl.float32)
    for at in range(begin, end, KEYS):
        token = at + tl.arange(0, KEYS)
        there = token < end
        page = tl.load(block_table_ptr + row.to(tl.int64) * width + token // PAGE, mask=there, other=0).to(tl.int64)
        place = (page * num_kv_heads + kv_head) * PAGE + token % PAGE
        where = place[:, None] * DIM + dim[None, :]
        seen = there[:, None] & (dim[None, :] < DIM)
        k = tl.load(keys_ptr + where, mask=seen, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        logits = tl.where(there[None, :], logits, float("-inf"))
        maximum = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp(logits - maximum[:, None])
        less = tl.exp(largest - maximum)
        v = tl.load(values_ptr + where, mask=seen, other=0.0)
        sums = sums * less[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        totals = totals * less + tl.sum(weights, 1)
        largest = maximum
    out = (first_head + head) * num_parts + part
    tl.store(sums_ptr + out[:, None] * DIM + dim[None, :], sums, mask=real)
    tl.store(largest_ptr + out, largest, mask=head < GROUP)
    tl.store(totals_ptr + out, totals, mask=head < GROUP)

# mypy: disable-error-code="no-untyped-def"
"""Triton kernels for experts packed as MXFP4, and for their activation. Imported only where they run.

A word is four bytes of a row of weights: eight consecutive values. Words are wide enough for the copies that run ahead
of a loop, and two values are decoded at a time, in the two halves of a word.

Legend: N rows, sorted by expert; E experts; O output and K input features; W words (K / 8) and G scales
(K / 32) to a row of weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..fused_cuda_kernels import clamped_swiglu

TWO_TO_126 = tl.constexpr(2.0**126)


@triton.jit
def _find_rows(offsets_ptr, index, num_rows, num_experts, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """The expert, first row and last row (exclusive) of a row tile, from the offsets alone.

    The rows behind the last expert are those of expert E, and tiles past the end are of an expert beyond it.
    """
    group = tl.arange(0, BLOCK_E)
    end = tl.load(offsets_ptr + group, mask=group < num_experts, other=num_rows)
    begin = tl.load(offsets_ptr + group - 1, mask=(group > 0) & (group <= num_experts), other=num_rows)
    begin = tl.where(group == 0, 0, begin)
    num_tiles = (end - begin + BLOCK_N - 1) // BLOCK_N
    last_tile = tl.cumsum(num_tiles, 0)
    expert = tl.sum((last_tile <= index).to(tl.int32), 0)
    first_row = begin + (index - last_tile + num_tiles) * BLOCK_N
    chosen = group == expert
    return expert, tl.sum(tl.where(chosen, first_row, 0), 0), tl.sum(tl.where(chosen, end, 0), 0)


@triton.jit
def _place(num_tiles, GROUP: tl.constexpr):
    """The row tile and feature tile of this program: GROUP row tiles, which share experts, stay together in L2."""
    program = tl.program_id(0)
    num_row_tiles = tl.num_programs(0) // num_tiles
    return tl.swizzle2d(program // num_tiles, program % num_tiles, num_row_tiles, num_tiles, GROUP)


@triton.jit
def _factor(scale, dtype: tl.constexpr):
    """`2 ** (scale - 127)` of E8M0 bytes, NaN for 255. The byte is the exponent of a float32, but for both its ends."""
    bits = scale.to(tl.int32) << 23
    bits = tl.where(scale == 0, 0x00400000, tl.where(scale == 255, 0x7FC00000, bits))
    return bits.to(tl.float32, bitcast=True).to(dtype)


@triton.jit
def _per_word(factor, NUM_ROWS: tl.constexpr, NUM_SCALES: tl.constexpr):
    """[rows, scales] to [rows, words]: four words share a scale."""
    factor = tl.broadcast_to(factor[:, :, None], (NUM_ROWS, NUM_SCALES, 4))
    return tl.reshape(factor, (NUM_ROWS, NUM_SCALES * 4))


@triton.jit
def _value(words, factor, J: tl.constexpr, dtype: tl.constexpr):
    """The J-th value of each word, in `dtype`.

    The two bits of exponent and the one of mantissa are put at their place in a wider float. Its exponent is biased
    by 126 more than theirs, so a power of two sets it right, for the subnormal 0.5 too. Both products are exact, as far
    as subnormals are not flushed to zero: they are not, unless a compiler is asked to.
    """
    if dtype == tl.bfloat16:
        # Values J and J + 4 in the halves of one word: the compiler keeps the pair for both.
        SHIFT: tl.constexpr = 4 * (J % 4)
        magnitude = (words << (6 - SHIFT)) if SHIFT <= 6 else (words >> (SHIFT - 6))
        pair = ((words << (12 - SHIFT)) & 0x80008000) | (magnitude & 0x01C001C0)
        value = (pair >> (16 * (J // 4))).to(tl.uint16).to(tl.bfloat16, bitcast=True) * TWO_TO_126 * factor
    else:
        nibble = words >> (4 * J)
        bits = ((nibble & 8) << 28) | ((nibble & 7) << 22)
        value = (bits.to(tl.float32, bitcast=True) * TWO_TO_126 * factor).to(dtype)
    return value


@triton.jit
def _decode(words, factor, dtype: tl.constexpr, NUM_ROWS: tl.constexpr, NUM_VALUES: tl.constexpr):
    """[rows, words] to the values in their order, [rows, words * 8]: each thread joins its own, and none is moved."""
    evens_04 = tl.join(_value(words, factor, 0, dtype), _value(words, factor, 4, dtype))
    evens_26 = tl.join(_value(words, factor, 2, dtype), _value(words, factor, 6, dtype))
    odds_15 = tl.join(_value(words, factor, 1, dtype), _value(words, factor, 5, dtype))
    odds_37 = tl.join(_value(words, factor, 3, dtype), _value(words, factor, 7, dtype))
    values = tl.join(tl.join(evens_04, evens_26), tl.join(odds_15, odds_37))
    return tl.reshape(values, (NUM_ROWS, NUM_VALUES))


@triton.jit(do_not_specialize=["num_rows"])
def forward_kernel(
    x_ptr,
    offsets_ptr,
    words_ptr,
    scales_ptr,
    y_ptr,
    num_rows,
    num_experts,
    out_features,
    num_scales,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`y[n] = W[expert of n] x[n]`: a tile [BLOCK_O, BLOCK_N] of y, transposed: weights stay in registers."""
    BLOCK_W: tl.constexpr = BLOCK_K // 8
    BLOCK_G: tl.constexpr = BLOCK_K // 32
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # float16 has too few exponents for a scale: its values are decoded in float32.
    wide: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float32
    row_tile, out_tile = _place(tl.cdiv(out_features, BLOCK_O), GROUP)
    expert, first_row, end_row = _find_rows(offsets_ptr, row_tile, num_rows, num_experts, BLOCK_N, BLOCK_E)
    if expert > num_experts:
        return
    # Rows of no expert take no step, and stay zero.
    num_steps = tl.where(expert < num_experts, tl.cdiv(num_scales, BLOCK_G), 0)
    expert = tl.minimum(expert, num_experts - 1).to(tl.int64)

    out = out_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    is_out = (out < out_features)[:, None]
    row = tl.arange(0, BLOCK_N)
    is_row = (first_row + row < end_row)[:, None]
    k, word, scale = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_G)
    num_words, num_features = num_scales * 4, num_scales * 32
    x_ptr += first_row.to(tl.int64) * num_features
    x_ptrs = x_ptr + row[:, None] * num_features + k[None, :]
    words_ptrs = words_ptr + expert * out_features * num_words + out[:, None] * num_words + word[None, :]
    scales_ptrs = scales_ptr + expert * out_features * num_scales + out[:, None] * num_scales + scale[None, :]

    acc = tl.zeros((BLOCK_O, BLOCK_N), tl.float32)
    # Bytes are too narrow for the copies that run ahead of a loop, so the next step's scales are loaded by hand.
    next_scales = tl.load(scales_ptrs, mask=is_out & (scale < num_scales)[None, :], other=127)
    for step in range(num_steps):
        words = tl.load(words_ptrs, mask=is_out & (word < num_words - step * BLOCK_W)[None, :], other=0)
        x = tl.load(x_ptrs, mask=is_row & (k < num_features - step * BLOCK_K)[None, :], other=0.0)
        factor = _per_word(_factor(next_scales, wide), BLOCK_O, BLOCK_G)
        x_ptrs += BLOCK_K
        words_ptrs += BLOCK_W
        scales_ptrs += BLOCK_G
        left = num_scales - (step + 1) * BLOCK_G
        next_scales = tl.load(scales_ptrs, mask=is_out & (scale < left)[None, :], other=127)
        words = words.to(tl.uint32, bitcast=True)
        weights = _decode(words, factor, dtype, BLOCK_O, BLOCK_K)
        acc = tl.dot(weights, tl.trans(x), acc, input_precision="ieee")

    y_ptr += first_row.to(tl.int64) * out_features
    y_ptrs = y_ptr + row[:, None] * out_features + out[None, :]
    tl.store(y_ptrs, tl.trans(acc).to(dtype), mask=is_row & (out < out_features)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def backward_input_kernel(
    dy_ptr,
    offsets_ptr,
    words_ptr,
    scales_ptr,
    dx_ptr,
    num_rows,
    num_experts,
    out_features,
    num_scales,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`dx[n] = dy[n] W[expert of n]`: a tile [BLOCK_N, BLOCK_K] of dx, the sum over all O features."""
    BLOCK_W: tl.constexpr = BLOCK_K // 8
    BLOCK_G: tl.constexpr = BLOCK_K // 32
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    wide: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float32
    row_tile, k_tile = _place(tl.cdiv(num_scales, BLOCK_G), GROUP)
    expert, first_row, end_row = _find_rows(offsets_ptr, row_tile, num_rows, num_experts, BLOCK_N, BLOCK_E)
    if expert > num_experts:
        return
    num_steps = tl.where(expert < num_experts, tl.cdiv(out_features, BLOCK_O), 0)
    expert = tl.minimum(expert, num_experts - 1).to(tl.int64)

    out, row = tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_N)
    is_row = (first_row + row < end_row)[:, None]
    num_words, num_features = num_scales * 4, num_scales * 32
    word = k_tile * BLOCK_W + tl.arange(0, BLOCK_W)
    scale = k_tile * BLOCK_G + tl.arange(0, BLOCK_G)
    is_word, is_scale = (word < num_words)[None, :], (scale < num_scales)[None, :]
    dy_ptrs = dy_ptr + first_row.to(tl.int64) * out_features + row[:, None] * out_features + out[None, :]
    words_ptrs = words_ptr + expert * out_features * num_words + out[:, None] * num_words + word[None, :]
    scales_ptrs = scales_ptr + expert * out_features * num_scales + out[:, None] * num_scales + scale[None, :]

    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    next_scales = tl.load(scales_ptrs, mask=is_scale & (out < out_features)[:, None], other=127)
    for step in range(num_steps):
        left = out_features - step * BLOCK_O
        words = tl.load(words_ptrs, mask=is_word & (out < left)[:, None], other=0)
        dy = tl.load(dy_ptrs, mask=is_row & (out < left)[None, :], other=0.0)
        factor = _per_word(_factor(next_scales, wide), BLOCK_O, BLOCK_G)
        dy_ptrs += BLOCK_O
        words_ptrs += BLOCK_O * num_words
        scales_ptrs += BLOCK_O * num_scales
        next_scales = tl.load(scales_ptrs, mask=is_scale & (out < left - BLOCK_O)[:, None], other=127)
        words = words.to(tl.uint32, bitcast=True)
        weights = _decode(words, factor, dtype, BLOCK_O, BLOCK_K)
        acc = tl.dot(dy, weights, acc, input_precision="ieee")

    k = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    dx_ptrs = dx_ptr + first_row.to(tl.int64) * num_features + row[:, None] * num_features + k[None, :]
    tl.store(dx_ptrs, acc.to(dtype), mask=is_row & (k < num_features)[None, :])


@triton.jit
def unpack_kernel(words_ptr, scales_ptr, dense_ptr, num_scales, BLOCK_G: tl.constexpr):
    """Every value of BLOCK_G blocks of 32, in the dtype of `dense_ptr`. Here rows do not matter."""
    BLOCK_W: tl.constexpr = BLOCK_G * 4
    dtype: tl.constexpr = dense_ptr.dtype.element_ty
    wide: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float32
    first = tl.program_id(0).to(tl.int64) * BLOCK_G
    left = num_scales - first
    scale, word, k = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_W * 8)
    scales = tl.load(scales_ptr + first + scale, mask=scale < left, other=127)
    words = tl.load(words_ptr + first * 4 + word, mask=word < left * 4, other=0).to(tl.uint32, bitcast=True)[None, :]
    factor = _per_word(_factor(scales, wide)[None, :], 1, BLOCK_G)
    values = _decode(words, factor, dtype, 1, BLOCK_W * 8)
    tl.store(dense_ptr + first * 32 + k, tl.reshape(values, (BLOCK_W * 8,)), mask=k < left * 32)


@triton.jit
def swiglu_kernel(gate_up_ptr, h_ptr, num_values, alpha, limit, BLOCK: tl.constexpr):
    """`h = clamped_swiglu(gate, up)` of BLOCK pairs, in float32."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index, left = tl.arange(0, BLOCK), num_values - first
    pairs = tl.arange(0, BLOCK * 2)
    both = tl.load(gate_up_ptr + first * 2 + pairs, mask=pairs < left * 2, other=0.0).to(tl.float32)
    gate, up = tl.split(tl.reshape(both, (BLOCK, 2)))
    h = clamped_swiglu(gate, up, alpha, limit)
    tl.store(h_ptr + first + index, h.to(h_ptr.dtype.element_ty), mask=index < left)


@triton.jit
def swiglu_backward_kernel(dh_ptr, gate_up_ptr, d_gate_up_ptr, num_values, alpha, limit, BLOCK: tl.constexpr):
    """The gradient of `swiglu_kernel`; zero where a clamp is active, and not where a value equals its limit."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index, left = tl.arange(0, BLOCK), num_values - first
    pairs = tl.arange(0, BLOCK * 2)
    both = tl.load(gate_up_ptr + first * 2 + pairs, mask=pairs < left * 2, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + first + index, mask=index < left, other=0.0).to(tl.float32)
    raw_gate, raw_up = tl.split(tl.reshape(both, (BLOCK, 2)))
    gate = tl.where(raw_gate > limit, limit, raw_gate)
    up = tl.where(raw_up > limit, limit, tl.where(raw_up < -limit, -limit, raw_up))
    sigmoid = tl.sigmoid(alpha * gate)
    d_gate = dh * (up + 1.0) * sigmoid * (1.0 + alpha * gate * (1.0 - sigmoid))
    d_gate = tl.where(raw_gate > limit, 0.0, d_gate)
    d_up = tl.where((raw_up > limit) | (raw_up < -limit), 0.0, dh * gate * sigmoid)
    grads = tl.reshape(tl.join(d_gate, d_up), (BLOCK * 2,))
    tl.store(d_gate_up_ptr + first * 2 + pairs, grads.to(d_gate_up_ptr.dtype.element_ty), mask=pairs < left * 2)

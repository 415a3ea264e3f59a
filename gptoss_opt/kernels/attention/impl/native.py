"""Decoding on CPUs by the native library: one query per row of the batch, and the row's keys are one long page."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ... import native
from ...gate import admit
from ..visible import Rules


def serves(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> bool:
    """Whether `forward` takes these: one query, nothing hidden but by the window, keys without gaps between them."""
    if q.shape[2] != 1 or not k.shape[2] or not rules.visible.everything or q.is_neg():
        return False
    there = all(x.is_contiguous() and not x.is_neg() for x in (k, v))
    return there and native.why_no_attention(q.device.type, q.dtype, q.shape[3]) is None


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, rules: Rules, *, instruction_set: int | None = None
) -> tuple[Tensor, Tensor]:
    """q [B, H, 1, D] -> the output [B, H, 1, D] and the log-sum-exp, sink included, [B, H, 1]. In float32 inside."""
    functions, best, parallel = native.library()
    batch, heads, _, dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    table, starts = (ctypes.c_int32 * batch)(*range(batch)), (ctypes.c_int32 * batch)()
    blocks = (ctypes.c_int32 * (4 * batch))(*(value for row in range(batch) for value in (row, row, 1, num_keys - 1)))
    tensors = (
        admit("q", q.squeeze(2), q.dtype, (batch, heads, dim)),
        admit("k", k, q.dtype, (batch, kv_heads, num_keys, dim), strided=False),
        admit("v", v, q.dtype, k.shape, strided=False),
        admit("sinks", sinks.to(torch.float32), torch.float32, (heads,)),
    )
    out, lse = q.new_empty(batch, heads, dim), q.new_empty(batch, heads, 1, dtype=torch.float32)
    arguments = native.PagedArguments(
        *map(Tensor.data_ptr, tensors),
        *map(ctypes.addressof, (table, starts, blocks)),
        out.data_ptr(),
        lse.data_ptr(),
        heads,
        kv_heads,
        dim,
        1,
        num_keys,
        rules.window or 0,
        heads // kv_heads,
        rules.scale,
        q.dtype == torch.bfloat16,
    )
    which = best if instruction_set is None else instruction_set
    if functions.gptoss_paged_attention(which, arguments, batch, parallel, torch.get_num_threads()):
        raise MemoryError("the native kernel found no memory for its scratch space.")
    return out[:, None].transpose(1, 2), lse

"""Attention on CPUs by the native library: each row of the batch is a sequence whose keys are one long page.

One query per row (decoding) in bfloat16 and float32, and several in bfloat16 where the library multiplies it.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ... import native
from ...gate import admit
from ..visible import Rules

QUERIES = 16
"""Queries in a unit of work, with all heads that share their keys: as many as keys are brought into order for."""


def serves(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> bool:
    """Whether `forward` takes these, nothing being hidden but by causality and the window."""
    if not q.shape[2] or not k.shape[2] or not rules.visible.everything or any(x.is_neg() for x in (q, k, v)):
        return False
    if native.why_no_attention(q.device.type, q.dtype, q.shape[3]) is not None:
        return False
    if q.shape[1] % k.shape[1] or q.shape[2] > k.shape[2]:
        return False  # torch says what does not go together
    if q.shape[2] > 1:
        return native.multiplies_attention(q.dtype, q.shape[3])
    return k.is_contiguous() and v.is_contiguous()  # to copy a cache for one query would take longer than torch does


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, rules: Rules, *, instruction_set: int | None = None
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, D] -> the output, laid out as [B, T, H, D], and the log-sum-exp, sink included, [B, H, T].

    Logits, softmax and sums are in float32; of several queries in bfloat16 the weights are rounded to it.
    """
    functions, best, parallel = native.library()
    batch, heads, num_queries, dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    group = heads // kv_heads
    table, starts = (ctypes.c_int32 * batch)(*range(batch)), (ctypes.c_int32 * batch)()
    before, several = num_keys - num_queries, num_queries > 1
    units = [  # those with many keys first: no thread is left alone with one of them at the end
        (row, row * num_queries + first, min(QUERIES, num_queries - first), before + first)
        for first in reversed(range(0, num_queries, QUERIES))
        for row in range(batch)
    ]
    blocks = (ctypes.c_int32 * (4 * len(units)))(*(value for unit in units for value in unit))
    tensors = (
        admit("q", q.transpose(1, 2).reshape(-1, heads, dim), q.dtype, (batch * num_queries, heads, dim)),
        admit("k", k, q.dtype, (batch, kv_heads, num_keys, dim), strided=several),
        admit("v", v, q.dtype, k.shape, strided=several),
        admit("sinks", sinks.to(torch.float32), torch.float32, (heads,)),
    )
    out = q.new_empty(batch, num_queries, heads, dim)
    lse = q.new_empty(batch, num_queries, heads, dtype=torch.float32)
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
        min(QUERIES, num_queries) * group,
        rules.scale,
        q.dtype == torch.bfloat16,
    )
    which = best if instruction_set is None else instruction_set
    native.check_memory(
        functions.gptoss_paged_attention(which, arguments, len(units), parallel, torch.get_num_threads())
    )
    return out.transpose(1, 2), lse.transpose(1, 2).contiguous()

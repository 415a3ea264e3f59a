"""Attention on pages in plain operations, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..paged import Paged


def decode(
    q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor, paged: Paged, scale: float, window: int | None
) -> Tensor:
    """Attention of decoding sequences: queries [R, H, D], whose keys are stored already, to [R, H, D].

    Every sequence is given as many keys as the block table is wide.
    """
    num_rows, num_heads, dim = q.shape
    num_kv_heads = keys.shape[1]
    token = torch.arange(paged.block_table.shape[1] * keys.shape[2], device=q.device)
    starts, lens = paged.context_starts, paged.context_lens
    oldest = starts if window is None else torch.maximum(starts, lens - window)
    seen = (token >= oldest[:, None]) & (token < lens[:, None])
    block_table = paged.block_table.long()
    k = keys[block_table].transpose(1, 2).flatten(2, 3)
    v = values[block_table].transpose(1, 2).flatten(2, 3)
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = (q.view(num_rows, num_kv_heads, -1, dim) @ k.mT).to(wide).mul_(scale)
    logits.masked_fill_(~seen[:, None, None], -torch.inf)
    sink = sinks.to(wide).view(1, num_kv_heads, -1, 1)
    largest = torch.maximum(logits.amax(-1, keepdim=True), sink)
    weights = logits.sub_(largest).exp_()
    weights.div_(weights.sum(-1, keepdim=True) + (sink - largest).exp())
    # A slot that is not seen may hold anything, and zero times that need not be zero.
    v = v.masked_fill(~seen[:, None, :, None], 0)
    return (weights.to(v.dtype) @ v).reshape(num_rows, num_heads, dim)

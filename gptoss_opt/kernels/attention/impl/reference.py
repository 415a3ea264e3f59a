"""Attention with sinks in the plainest form: it defines what every other backend must compute.

Shapes: B batch, H query heads, N key/value heads, T queries, S keys, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..visible import Rules, dense_mask


def reference_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, rules: Rules) -> Tensor:
    """q [B, H, T, D], k and v [B, N, S, D], sinks [H] -> [B, H, T, D]. Memory grows with T * S.

    Each sink is one more logit in its head's softmax, with no value behind it
    (openai/gpt-oss, `gpt_oss/torch/model.py`, `sdpa`).
    """
    scale, window, visible = rules
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = q @ k.mT * scale
    # The softmax is at least float32; the products stay in the dtype of the inputs.
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if visible.mask is None:
        scores = scores.masked_fill(~dense_mask(visible, q.shape[2], k.shape[2], window, q.device), -torch.inf)
    elif visible.mask.dtype == torch.bool:
        scores = scores.masked_fill(~visible.mask, -torch.inf)
    else:
        scores = scores + visible.mask
    sink = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    return weights.to(v.dtype) @ v

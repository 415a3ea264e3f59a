"""Decoding as two matrix products: one query per row, the query heads of a group as the rows of its product.

A tile kernel for any device. Nothing is read back, so a decode step can be captured in a CUDA graph; the logits of one
query are all it holds.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Folded:
    """Plain products on q [b, g, t, D], k and v [b, g, s, D], with the softmax in at least float32."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        logits = self._logits(q, k, mask, causal, scale)
        lse = logits.logsumexp(-1)
        return (logits - lse[..., None]).exp_().to(v.dtype) @ v, lse

    def backward(
        self,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = (self._logits(q, k, mask, causal, scale) - lse[..., None]).exp_()
        delta = torch.linalg.vecdot(d_out.to(lse.dtype), out.to(lse.dtype))[..., None]
        d_logits = ((weights * ((d_out @ v.mT).to(lse.dtype) - delta)) * scale).to(q.dtype)
        return d_logits @ k, d_logits.mT @ q, weights.to(v.dtype).mT @ d_out

    def _logits(self, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
        assert not causal, "one query is aligned with the last key it sees"
        logits = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
        return logits if mask is None else logits + mask

"""A varlen flash kernel in plain products: the contract of the GPU kernels, to test what surrounds them on a CPU."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from gptoss_opt.kernels.attention.varlen import VarlenCall


def _logits(q: Tensor, k: Tensor, scale: float, window: int | None) -> Tensor:
    slot = torch.arange(len(q))[:, None] + len(k) - len(q)
    key = torch.arange(len(k))
    seen = key <= slot
    if window is not None:
        seen = seen & (key > slot - window)
    logits = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    return logits.masked_fill(~seen, -torch.inf)


def _sequences(call: VarlenCall) -> list[tuple[slice, slice]]:
    cu_q, cu_k = call.cu_q.tolist(), call.cu_k.tolist()
    assert call.max_q == max(b - a for a, b in pairwise(cu_q))
    assert call.max_k == max(b - a for a, b in pairwise(cu_k))
    return [(slice(*q), slice(*k)) for q, k in zip(pairwise(cu_q), pairwise(cu_k), strict=True)]


def forward(q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The output [P, H, D] and the log-sum-exp [H, P], sinks included if given."""
    outs, lses = [], []
    for queries, keys in _sequences(call):
        logits = _logits(q[queries], k[keys], call.scale, call.window)
        lse = logits.logsumexp(-1)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks[:, None].to(lse.dtype))
        values = v[keys].repeat_interleave(q.shape[1] // v.shape[1], 1)
        outs.append(torch.einsum("hqk,khd->qhd", (logits - lse[..., None]).exp(), values))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, 1)


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: VarlenCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv from whatever `out` and `lse` are given, as flash kernels compute them."""
    group = q.shape[1] // k.shape[1]
    parts = []
    for queries, keys in _sequences(call):
        wide_k, wide_v = (x[keys].repeat_interleave(group, 1) for x in (k, v))
        weights = (_logits(q[queries], k[keys], call.scale, call.window) - lse[:, queries, None]).exp()
        delta = (d_out[queries] * out[queries]).sum(-1).mT[..., None]
        d_logits = weights * (torch.einsum("qhd,khd->hqk", d_out[queries], wide_v) - delta) * call.scale
        dq = torch.einsum("hqk,khd->qhd", d_logits, wide_k)
        dk = torch.einsum("hqk,qhd->khd", d_logits, q[queries]).unflatten(1, (-1, group)).sum(2)
        dv = torch.einsum("hqk,qhd->khd", weights, d_out[queries]).unflatten(1, (-1, group)).sum(2)
        parts.append((dq, dk, dv))
    dq, dk, dv = (torch.cat(part) for part in zip(*parts, strict=True))
    return dq, dk, dv


class EmulatedKernel:
    """A varlen kernel, with or without sinks of its own."""

    def __init__(self, knows_sinks: bool) -> None:
        self.knows_sinks = knows_sinks

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, call: VarlenCall) -> tuple[Tensor, Tensor]:
        return forward(q, k, v, call, sinks if self.knows_sinks else None)

    def backward(self, *args, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
        return backward(*args, **kwargs)

"""Decoding: one query per row, as two matrix products with the query heads of a group as rows.

A flash kernel would gain nothing here: the logits of one query are small. Keys and values are read once and never
repeated, the sink goes straight into the softmax, and nothing is read back from a GPU, so that a CUDA graph can capture
the step. Any device.

Shapes: B batch, H = N * G query heads, N key/value heads, S keys, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .visible import Rules, dense_mask, first_slot


def forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """q [B, H, 1, D] -> the output [B, H, 1, D] and the log-sum-exp, sink included, [B, H, 1]."""
    slots, seen = _seen(q, k, rules)
    logits = _logits(_fold(q, k), k[:, :, slots], seen, rules.scale)
    sink = sinks.to(logits.dtype).view(1, k.shape[1], -1, 1)
    largest = torch.maximum(logits.amax(-1, keepdim=True), sink)
    weights = logits.sub_(largest).exp_()
    total = weights.sum(-1, keepdim=True) + (sink - largest).exp()
    out = weights.div_(total).to(v.dtype) @ v[:, :, slots]
    lse = largest + total.log()
    return out.flatten(1, 2)[:, None].transpose(1, 2), lse.flatten(1, 2)


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rules: Rules
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [B, H, 1, D], dk and dv [B, N, S, D], given what `forward` returned."""
    slots, seen = _seen(q, k, rules)
    q_rows, out_rows, d_rows, lse_rows = (_fold(x, k) for x in (q, out, d_out, lse[..., None]))
    weights = (_logits(q_rows, k[:, :, slots], seen, rules.scale) - lse_rows).exp_()
    delta = torch.linalg.vecdot(d_rows.to(lse.dtype), out_rows.to(lse.dtype))[..., None]
    d_logits = ((weights * ((d_rows @ v[:, :, slots].mT).to(lse.dtype) - delta)) * rules.scale).to(q.dtype)
    dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)
    dk[:, :, slots] = d_logits.mT @ q_rows
    dv[:, :, slots] = weights.to(v.dtype).mT @ d_rows
    return (d_logits @ k[:, :, slots]).flatten(1, 2)[:, :, None], dk, dv


def _fold(x: Tensor, k: Tensor) -> Tensor:
    """[B, H, 1, *] -> [B, N, G, *]."""
    return x.squeeze(2).unflatten(1, (k.shape[1], -1))


def _logits(q: Tensor, k: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """In at least float32, whatever the products are in."""
    logits = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)).mul_(scale)
    return logits if seen is None else logits.masked_fill_(~seen, -torch.inf)


def _seen(q: Tensor, k: Tensor, rules: Rules) -> tuple[slice, Tensor | None]:
    """Which slots to look at, and which of them each row sees, bool [B or 1, 1, 1, s] (None: all of them)."""
    num_keys, (_, window, visible) = k.shape[2], rules
    if visible.everything:
        return slice(0 if window is None else max(0, num_keys - window), num_keys), None
    mask = dense_mask(visible, 1, num_keys, window, q.device)
    if q.device.type != "cpu":
        return slice(0, num_keys), mask
    # On a CPU the place of the query can be read, and empty slots left out.
    end = first_slot(visible, 1, num_keys) + 1
    slots = slice(0 if window is None else max(0, end - window), end)
    return slots, mask[..., slots]

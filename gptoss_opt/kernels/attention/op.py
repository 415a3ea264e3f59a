"""Attention as one torch operator per direction, so that torch.compile, autograd and checkpointing see a single node.

What it reads on the way (padding, sequence starts) stays inside: no graph break.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import KERNELS
from .tiled import accumulator
from .visible import Rules, Visible


@torch.library.custom_op("gptoss_opt::sink_attention", mutates_args=())
def sink_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    q_start: Tensor | None,
    keys: Tensor | None,
    starts: Tensor | None,
    mask: Tensor | None,
    scale: float,
    window: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The output [B, H, T, D], laid out as [B, T, H, D], and the log-sum-exp, sink included, [B, H, T]."""
    rules = Rules(scale, window, Visible(q_start, keys, starts, mask))
    return KERNELS[backend](q).forward(q, k, v, sinks, rules)


@sink_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, num_queries, dim = q.shape
    out = q.new_empty(batch, num_queries, heads, dim).transpose(1, 2)
    return out, q.new_empty(batch, heads, num_queries, dtype=accumulator(q.dtype))


@torch.library.custom_op("gptoss_opt::sink_attention_backward", mutates_args=())
def sink_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    out: Tensor,
    lse: Tensor,
    q_start: Tensor | None,
    keys: Tensor | None,
    starts: Tensor | None,
    mask: Tensor | None,
    scale: float,
    window: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dsinks.

    With L the log-sum-exp, sink included, the sink's weight is `exp(sink - L)` and its value is zero, so
    `dsink = -sum(exp(sink - L) * (d_out * out).sum(-1))`.
    """
    rules = Rules(scale, window, Visible(q_start, keys, starts, mask))
    dq, dk, dv = KERNELS[backend](q).backward(d_out, q, k, v, out, lse, rules)
    weight = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
    d_sinks = -(weight * torch.linalg.vecdot(d_out.to(lse.dtype), out.to(lse.dtype))).sum((0, 2))
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), d_sinks.to(sinks.dtype)


@sink_attention_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), sinks.new_empty(sinks.shape)


def _no_second(ctx: Any, *grads: Tensor) -> None:
    raise ValueError(
        "flash attention has no second derivative: only backend='reference' is made of plain operations. Apply "
        "with_flash_attention(backend='reference')."
    )


sink_attention_backward.register_autograd(_no_second)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, q_start, keys, starts, mask, ctx.scale, ctx.window, ctx.backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, sinks, out, lse, q_start, keys, starts, mask)


def _backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grads = sink_attention_backward(d_out, *saved, ctx.scale, ctx.window, ctx.backend)
    return *grads, None, None, None, None, None, None, None


sink_attention.register_autograd(_backward, setup_context=_save)

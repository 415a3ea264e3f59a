"""Attention with sinks from a GPU flash kernel that takes sequences of various lengths, packed end to end.

The kernel returns its log-sum-exp and has a separate backward. With L = logaddexp(lse, sink) the sinked output is
`out * exp(lse - L)`; the backward is handed that output and L, which makes dq, dk and dv exact. What no such kernel can
express goes through `tiled`: one query per row (decoding, where nothing may wait for the device), masks, rows with
padding between their tokens, and the queries of padding at the end.

Shapes: B batch, H query heads, N key/value heads, T queries, S keys, D head dim, P packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import tiled
from .visible import Rules, Segment, segments


class VarlenCall(NamedTuple):
    """What a kernel is asked for: cumulative lengths of the packed sequences, int32 [num_sequences + 1], the longest of
    them (these four in the order that torch's own kernels take), the scale, and the window (None: unlimited)."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    scale: float
    window: int | None


class VarlenKernel(Protocol):
    """A causal flash kernel on packed q [P, H, D], k and v [P, N, D], aligned at the end of each sequence.

    `forward` gives the output [P, H, D] and the log-sum-exp, float32 [H, P]; `backward` gives dq, dk and dv for any
    `out` and `lse` of these shapes.

    Attributes:
        knows_sinks: it takes the sinks itself, and the log-sum-exp it returns includes them.
    """

    @property
    def knows_sinks(self) -> bool: ...
    def forward(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, call: VarlenCall) -> tuple[Tensor, Tensor]: ...
    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: VarlenCall
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class Packing(NamedTuple):
    """Which tokens of [B, T] and [B, S] are packed, in order (None: all of them), and what to ask of the kernel.

    What cannot be packed is in `others`.
    """

    queries: Tensor | None
    keys: Tensor | None
    call: VarlenCall
    others: Sequence[Segment] = ()


def _pack(x: Tensor, tokens: Tensor | None) -> Tensor:
    """[B, heads, len, D] -> [P, heads, D]."""
    flat = x.transpose(1, 2).flatten(0, 1)
    return flat if tokens is None else flat[tokens]


def _unpack(packed: Tensor, tokens: Tensor | None, batch: int, length: int) -> Tensor:
    """[P, heads, D] -> [B, heads, len, D], laid out as [B, len, heads, D]; zeros where nothing was packed."""
    if tokens is not None:
        packed = packed.new_zeros(batch * length, *packed.shape[1:]).index_copy_(0, tokens, packed)
    return packed.unflatten(0, (batch, length)).transpose(1, 2)


def _plan(q: Tensor, k: Tensor, rules: Rules) -> Packing | None:
    """How to pack attention on q [B, H, T, D] and k [B, N, S, D], or None if a varlen kernel cannot express it."""
    num_queries, num_keys, device = q.shape[2], k.shape[2], q.device
    if rules.visible.mask is not None or num_queries == 1 or not q.numel():
        return None
    everything = segments(rules.visible, q.shape[0], num_queries, num_keys)
    found = [segment for segment in everything if not segment.holes and not segment.behind]
    if not found:
        return None
    q_lengths = [segment.q1 - segment.q0 for segment in found]
    k_lengths = [segment.k1 - segment.k0 for segment in found]
    cu_q, cu_k = (
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device) for lengths in (q_lengths, k_lengths)
    )
    call = VarlenCall(cu_q, cu_k, max(q_lengths), max(k_lengths), rules.scale, rules.window)
    if rules.visible.everything:
        return Packing(None, None, call)
    queries = [torch.arange(s.q0, s.q1) + s.row * num_queries for s in found]
    keys = [torch.arange(s.k0, s.k1) + s.row * num_keys for s in found]
    others = [segment for segment in everything if segment.holes or segment.behind]
    return Packing(torch.cat(queries).to(device), torch.cat(keys).to(device), call, others)


def forward(
    kernel: VarlenKernel, masked: tiled.TileKernel, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, rules: Rules
) -> tuple[Tensor, Tensor]:
    """As `tiled.forward`. `masked` does what cannot be packed."""
    packing = _plan(q, k, rules)
    if packing is None:
        return tiled.forward(masked, q, k, v, sinks, rules)
    tokens = _pack(q, packing.queries), _pack(k, packing.keys), _pack(v, packing.keys)
    packed, packed_lse = kernel.forward(*tokens, sinks, packing.call)
    if not kernel.knows_sinks:
        total = torch.logaddexp(packed_lse, sinks.to(packed_lse.dtype)[:, None])
        packed = (packed * (packed_lse - total).exp().mT[..., None]).to(packed.dtype)
        packed_lse = total
    batch, num_queries = q.shape[0], q.shape[2]
    out = _unpack(packed, packing.queries, batch, num_queries)
    if packing.queries is not None:
        # A query that sees no key sees the sink.
        flat = sinks.to(packed_lse.dtype)[:, None].repeat(1, batch * num_queries)
        packed_lse = flat.index_copy_(1, packing.queries, packed_lse)
    lse = packed_lse.unflatten(1, (batch, num_queries)).transpose(0, 1).contiguous()
    if packing.others:
        tiled.attend(masked, q, k, v, out, lse[..., None], rules, packing.others)
    return out, lse


def backward(
    kernel: VarlenKernel,
    masked: tiled.TileKernel,
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rules: Rules,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `tiled.backward`. `masked` does what cannot be packed."""
    packing = _plan(q, k, rules)
    if packing is None:
        return tiled.backward(masked, d_out, q, k, v, out, lse, rules)
    d_out_packed, q_packed, out_packed = (_pack(x, packing.queries) for x in (d_out, q, out))
    k_packed, v_packed = (_pack(x, packing.keys) for x in (k, v))
    lse_packed = lse.transpose(0, 1).flatten(1)
    if packing.queries is not None:
        lse_packed = lse_packed[:, packing.queries]
    dq, dk, dv = kernel.backward(
        d_out_packed, q_packed, k_packed, v_packed, out_packed, lse_packed.contiguous(), packing.call
    )
    dq = _unpack(dq, packing.queries, q.shape[0], q.shape[2])
    dk, dv = (_unpack(x, packing.keys, k.shape[0], k.shape[2]) for x in (dk, dv))
    if packing.others:
        dk, dv = (x.to(tiled.accumulator(x.dtype)) for x in (dk, dv))
        tiled.attend_backward(masked, d_out, q, k, v, out, lse, dq, dk, dv, rules, packing.others)
    return dq, dk.to(k.dtype), dv.to(v.dtype)

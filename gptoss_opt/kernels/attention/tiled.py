"""Exact attention with sinks, forward and backward, from any flash kernel that does one tile.

Two facts carry it:
- a sink is a key with a zero value, so the output starts as "only the sink was seen" and each tile is merged in
  through its log-sum-exp (Dao et al. 2022, FlashAttention, section 3.1, online softmax);
- the backward of a flash kernel needs only the final output and log-sum-exp, so handing it the merged ones makes
  each tile's dq, dk and dv exact.

Shapes: B batch, H query heads, N key/value heads, T queries, S keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import decode
from .tiles import Blocks, Rectangle, Tile, chunks_of, tiles_of
from .visible import Rules, Segment, Visible, dense_mask, segments


class TileCall(NamedTuple):
    """What a kernel is asked for: an additive mask that broadcasts to [b, g, t, s], or causality (then t = s)."""

    mask: Tensor | None
    causal: bool
    scale: float


class TileKernel(Protocol):
    """A flash kernel on q [b, g, t, D], k and v [b, g, s, D].

    `forward` gives the output, like q, and the log-sum-exp [b, g, t] of the scaled logits; `backward` gives dq, dk and
    dv for any `out` and `lse` of these shapes.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: TileCall) -> tuple[Tensor, Tensor]: ...
    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: TileCall
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def forward(kernel: TileKernel, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """The output [B, H, T, D] and the log-sum-exp, sink included, [B, H, T]."""
    if _decodes(q, k, rules):
        return decode.forward(q, k, v, sinks, rules)
    batch, heads, num_queries, dim = q.shape
    out = q.new_zeros(batch, num_queries, heads, dim).transpose(1, 2)
    # Before any key is seen there is only the sink. A trailing dim lets tiles treat it as they treat queries.
    lse = sinks.to(accumulator(q.dtype))[None, :, None, None].repeat(batch, 1, num_queries, 1)
    attend(kernel, q, k, v, out, lse, rules)
    return out, lse.squeeze(-1)


def attend(
    kernel: TileKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rules: Rules,
    found: Sequence[Segment] | None = None,
) -> None:
    """Merge what the queries see (of these segments; of all, if it is left out) into `out` and `lse` [B, H, T, 1]."""
    queries, keys = _in_groups((q, out, lse), (k, v))
    for tile, mask in _plan(q, k, rules, found):
        q_tile, out_tile, lse_tile = map(tile.queries, queries)
        k_tile, v_tile = map(tile.keys, keys)
        part, part_lse = kernel.forward(q_tile, k_tile, v_tile, TileCall(mask, tile.causal, rules.scale))
        _merge(out_tile, lse_tile, part, part_lse[..., None], tile.first)


def backward(
    kernel: TileKernel, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rules: Rules
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [B, H, T, D], dk and dv [B, N, S, D], given what `forward` returned."""
    if _decodes(q, k, rules):
        return decode.backward(d_out, q, k, v, out, lse, rules)
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    # Heads of a group and neighbouring tiles add up in one key: sum them in at least float32.
    dk = k.new_zeros(k.shape, dtype=accumulator(k.dtype))
    dv = torch.zeros_like(dk)
    attend_backward(kernel, d_out, q, k, v, out, lse, dq, dk, dv, rules)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def attend_backward(
    kernel: TileKernel,
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    rules: Rules,
    found: Sequence[Segment] | None = None,
) -> None:
    """Add the gradients of what the queries see to `dk` and `dv`, and put those of the queries into `dq`."""
    queries, keys = _in_groups((d_out, q, out, lse, dq), (k, v))
    for tile, mask in _plan(q, k, rules, found):
        d_out_tile, q_tile, out_tile, lse_tile, dq_tile = map(tile.queries, queries)
        k_tile, v_tile = map(tile.keys, keys)
        call = TileCall(mask, tile.causal, rules.scale)
        parts = kernel.backward(d_out_tile, q_tile, k_tile, v_tile, out_tile, lse_tile, call)
        if tile.first:
            dq_tile.copy_(parts[0])
        else:
            dq_tile.add_(parts[0])
        tile.add_to_keys(dk, parts[1])
        tile.add_to_keys(dv, parts[2])


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _decodes(q: Tensor, k: Tensor, rules: Rules) -> bool:
    return q.shape[2] == 1 and k.shape[2] > 0 and rules.visible.mask is None


def _in_groups(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What tiles take views of: queries [B, H, T, *] as [B, N, G, T, *], and keys [B, N, S, D] as [B, N, G, S, D]."""
    shape = keys[0].shape[1], queries[0].shape[1] // keys[0].shape[1]
    wide = [x[:, :, None].expand(-1, -1, shape[1], -1, -1) for x in keys]
    return [x.unflatten(1, shape) for x in queries], wide


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, first: bool) -> None:
    """Merge one tile into what was seen so far, in place. All [b, g, t, *]; lse and part_lse have a trailing 1."""
    merged = torch.logaddexp(lse, part_lse)
    weight = (part_lse - merged).exp_()
    # Head by head: the products in the accumulator's dtype stay in the cache.
    for index in range(out.shape[0]):
        scaled = part[index] * weight[index]
        if not first:
            scaled += out[index] * (lse[index] - merged[index]).exp_()
        out[index].copy_(scaled)
    lse.copy_(merged)


def _plan(q: Tensor, k: Tensor, rules: Rules, found: Sequence[Segment] | None) -> Iterator[tuple[Tile, Tensor | None]]:
    batch, num_queries = q.shape[0], q.shape[2]
    num_kv_heads, num_keys = k.shape[1:3]
    _, window, visible = rules
    if num_queries == 0 or num_keys == 0 or batch == 0:
        return
    if visible.mask is not None:
        yield from _plan_mask(q, visible.mask, num_kv_heads, num_keys)
        return
    bands: dict[int, Tensor] = {}
    for segment in segments(visible, batch, num_queries, num_keys) if found is None else found:
        if segment.holes or (segment.behind and window is not None):
            for chunk, before in chunks_of(segment, window):
                # A chunk is of one sequence: only padding is left to say.
                keys = None if visible.keys is None else visible.keys[chunk.row : chunk.row + 1, chunk.k0 : chunk.k1]
                padding = Visible(torch.tensor(before, device=q.device), keys)
                mask = dense_mask(padding, chunk.q1 - chunk.q0, chunk.k1 - chunk.k0, window, q.device)
                yield chunk, additive(mask, q.dtype)
            continue
        for tile in tiles_of(segment, window, num_kv_heads):
            size = tile.num_queries if isinstance(tile, Blocks) else tile.q1 - tile.q0
            if tile.band and window and size not in bands:
                # A block's keys are the `window - 1` before it, and its own.
                bands[size] = additive(dense_mask(Visible(), size, size + window - 1, window, q.device), q.dtype)
            yield tile, bands[size] if tile.band else None


BLOCK_OF_MASK = 512
"""Queries at a time under a user's mask: bounds the additive copy of it."""


def _plan_mask(q: Tensor, mask: Tensor, num_kv_heads: int, num_keys: int) -> Iterator[tuple[Tile, Tensor]]:
    batch, heads, num_queries, _ = q.shape
    mask = mask.expand(batch, -1, num_queries, num_keys)
    for row in range(batch):
        heads_mask = mask[row].unflatten(0, (num_kv_heads, -1)) if mask.shape[1] == heads else mask[row][None]
        for begin in range(0, num_queries, BLOCK_OF_MASK):
            end = min(begin + BLOCK_OF_MASK, num_queries)
            yield Rectangle(row, begin, end, 0, num_keys), additive(heads_mask[:, :, begin:end], q.dtype)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask, bool (True: may see) or additive, as an additive one without infinities.

    With infinities a kernel has no log-sum-exp for a query that sees nothing; the lowest finite number gives it one
    that loses against any sink.
    """
    low = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, low)
    # A mask in more than the dtype of the products says more than they can hold: it stays in the accumulator's.
    if mask.dtype != dtype:
        dtype = accumulator(dtype)
    return mask.to(dtype).clamp(min=low)

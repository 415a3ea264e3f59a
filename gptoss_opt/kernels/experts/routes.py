"""Which rows go to which expert: tokens sorted by expert on the way in, summed by token on the way out.

Legend: T tokens, K experts per token, E experts here, N = T * K rows, H values of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routes:
    """Rows sorted by expert, in the order of tokens within an expert.

    Routes to an expert outside `[0, E)`, such as those of another rank, come last and belong to no expert.

    Attributes:
        order: int64 `[N]`; row `n` is route `order[n]` of the routes laid out token by token.
        inverse: int64 `[N]`; the row of each route.
        offsets: int32 `[E]`; the rows of expert `e` end before `offsets[e]`, and begin where those of `e - 1` end.
        top_k: K.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor
    top_k: int

    @classmethod
    def of(cls, indices: Tensor, num_experts: int) -> Routes:
        """The routes of `indices` [T, K], any integer dtype. Never waits for the device."""
        flat = indices.reshape(-1)
        keys = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
        keys, order = torch.sort(keys, stable=True)
        experts = torch.arange(num_experts, device=keys.device, dtype=keys.dtype)
        offsets = torch.searchsorted(keys, experts, right=True, out_int32=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        return cls(order, inverse, offsets, indices.shape[-1])

    def gather(self, x: Tensor) -> Tensor:
        """`x` [T, H] as rows [N, H]."""
        return cast(Tensor, _Gather.apply(x, self.order // self.top_k, self.inverse, self.top_k))

    def combine(self, y: Tensor, routing_weights: Tensor) -> Tensor:
        """The sums [T, H] over each token's rows of `y` [N, H], weighted by [T, K], always in one order."""
        routes = cast(Tensor, _Gather.apply(y, self.inverse, self.order, 1)).unflatten(0, (-1, self.top_k))
        return torch.bmm(routing_weights.to(y.dtype)[:, None], routes)[:, 0]


class _Gather(torch.autograd.Function):
    """`x[rows]`, where each row of x is taken `times` times; its gradient sums them in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, inverse: Tensor, times: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.times = times
        return x[rows]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        d_x = grads[0][inverse]
        return d_x if ctx.times == 1 else d_x.reshape(-1, ctx.times, d_x.shape[-1]).sum(1), None, None, None


def of_expert(offsets: Tensor) -> list[tuple[int, int, int]]:
    """`(expert, begin, end)` of every expert that has rows. Waits for the device."""
    stops = offsets.tolist()
    return [(e, a, b) for e, (a, b) in enumerate(zip([0, *stops], stops, strict=False)) if b > a]


def expert_of_rows(offsets: Tensor, num_rows: int) -> Tensor:
    """The expert of each row, int64 [N]; E for rows of no expert."""
    rows = torch.arange(num_rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, rows, right=True)


def add_bias(y: Tensor, offsets: Tensor, bias: Tensor) -> Tensor:
    """`y` [N, out] plus the bias [E, out] of each row's expert; rows of no expert stay as they are."""
    padded = torch.cat((bias.to(y.dtype), bias.new_zeros(1, bias.shape[1], dtype=y.dtype)))
    return y + padded[expert_of_rows(offsets, y.shape[0])]


def sum_by_expert(rows: Tensor, offsets: Tensor) -> Tensor:
    """`rows` [N, H] summed by expert [E, H], in a fixed order."""
    experts = torch.arange(offsets.numel(), device=offsets.device)
    return (experts[:, None] == expert_of_rows(offsets, rows.shape[0])).to(rows.dtype) @ rows

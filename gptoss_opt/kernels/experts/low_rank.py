"""Products with expert weights that have a low-rank change, which is applied to rows grouped by expert.

Legend: E experts here, N rows sorted by expert, r the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from ..low_rank import LowRank, dropped
from ..native.low_rank import add_from_rank, add_gradients, serves, to_rank
from ..tracing import is_traced
from .backends import ROW_BYTES, kernel_of, torch_backend
from .linear import linear
from .weights import DenseWeights, ExpertsRequest, ExpertWeights, weights_of


def changed_linear(x: Tensor, offsets: Tensor, weights: ExpertWeights, change: LowRank, backend: str) -> Tensor:
    """`x` [N, in] times the weights of each row's expert, changed by `change`, plus its bias: [N, out].

    Differentiable, twice as well, in `x`, in both factors, and in all weights but packed ones.

    Example:
        >>> change = LowRank(torch.ones(2, 1, 16), torch.ones(2, 32, 1), scale=0.5)
        >>> x, offsets = torch.ones(3, 16), torch.tensor([1, 3], dtype=torch.int32)
        >>> changed_linear(x, offsets, DenseWeights(torch.zeros(2, 16, 32)), change, "torch")[0, :4]
        tensor([8., 8., 8., 8.])
    """
    plain = not change.dropout and not is_traced(x, change.a, change.b)
    frozen = not any(tensor is not None and tensor.requires_grad for tensor in (*weights.tensors, weights.bias))
    if plain and frozen and serves(x, change.a.shape[2], change.b.shape[1]):
        a, b = change.factors(torch.float32)
        arguments = (x, a, b.mT.contiguous(), offsets, *weights.tensors, weights.bias, backend)
        return cast(Tensor, _BesideFrozen.apply(*arguments))
    a, b = change.factors(x.dtype)
    return linear(x, offsets, weights, backend) + _through(dropped(x, change.dropout), offsets, a, b.mT)


def _through(x: Tensor, offsets: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`x` [N, in] through A [E, r, in] and B transposed [E, r, out], as two products with dense weights: [N, out]."""
    # torch's grouped product takes rows of a multiple of some bytes alone: the rank is filled up with zeros.
    more = -a.shape[1] % (ROW_BYTES // x.dtype.itemsize)
    first, second = (functional.pad(factor, (0, 0, 0, more)) for factor in (a, b))
    backend = torch_backend(ExpertsRequest(x.device.type, x.dtype, (*first.shape[1:], second.shape[2]))).name
    return linear(linear(x, offsets, DenseWeights(first.mT), backend), offsets, DenseWeights(second), backend)


class _BesideFrozen(torch.autograd.Function):
    """The product with frozen weights and their change, on a CPU: both are added up where the first one lies."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        offsets: Tensor,
        weight: Tensor,
        scales: Tensor | None,
        bias: Tensor | None,
        backend: str,
    ) -> Tensor:
        weights = weights_of(weight, scales, bias)
        y = kernel_of(weights, backend).forward(x, offsets, weights).contiguous()
        hidden = to_rank(x, offsets, a)
        add_from_rank(y, offsets, hidden, b)
        of_factors = any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(x if of_factors else None, hidden if of_factors else None, a, b, offsets, weight, scales)
        ctx.backend = backend
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, a, b, offsets, weight, scales = ctx.saved_tensors
        d_y, weights = grads[0].contiguous(), weights_of(weight, scales)
        wanted, no_more = ctx.needs_input_grad[:3], [None] * 5
        if torch.is_grad_enabled():
            found = _differentiable_gradients(d_y, x, a, b, offsets, weights, ctx.backend)
            return *(one if of_it else None for one, of_it in zip(found, wanted, strict=True)), *no_more
        of_x, *of_factors = wanted
        d_x = kernel_of(weights, ctx.backend).backward(d_y, offsets, weights).contiguous() if of_x else None
        return d_x, *add_gradients(d_y, d_x, offsets, (a, b), x, hidden, wanted=of_factors), *no_more


def _differentiable_gradients(
    d_y: Tensor, x: Tensor | None, a: Tensor, b: Tensor, offsets: Tensor, weights: ExpertWeights, backend: str
) -> Sequence[Tensor]:
    """The gradients for x, A and B of `d_y`, made of what can be differentiated again."""
    # Without x neither factor takes a gradient, and that of x does not depend on it.
    x = d_y.new_zeros(d_y.shape[0], a.shape[2]) if x is None else x
    x, a, b = (one if one.requires_grad else one.detach().requires_grad_() for one in (x, a, b))
    y = linear(x, offsets, weights, backend) + _through(x, offsets, a.to(x.dtype), b.to(x.dtype))
    return torch.autograd.grad(y, (x, a, b), d_y, create_graph=True)

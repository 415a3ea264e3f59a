"""The experts of GPT-OSS on dense or packed weights: route, group by expert, gate_up, SwiGLU, down, weighted sum."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import transforms
from ..low_rank import LowRank
from ..tracing import is_traced, needs_operator
from .activation import swiglu
from .backends import DENSE_BACKENDS, PACKED_BACKENDS, Kernel, kernel_of, torch_backend
from .check import check
from .fused_cuda import route, serves
from .impl.reference import all_experts
from .linear import linear
from .low_rank import changed_linear
from .routes import Routes
from .weights import DenseWeights, ExpertsRequest, ExpertWeights, PackedWeights


def experts(
    x: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    *,
    alpha: float,
    limit: float,
    backend: str,
    changes: tuple[LowRank | None, LowRank | None] = (None, None),
) -> Tensor:
    """The weighted sum of each token's experts. Deterministic; differentiable in all but packed weights.

    Routes to experts outside `[0, E)` add nothing. Any number of tokens, from 0 up.

    Args:
        x: `[T, H]`.
        indices: integers `[T, K]`, the experts of each token.
        routing_weights: `[T, K]`, their weights.
        gate_up: weights [H, 2 I] per expert, gate and up interleaved.
        down: weights [I, H] per expert, stored as `gate_up` is.
        alpha: the steepness of the SwiGLU's sigmoid.
        limit: where the SwiGLU clamps.
        backend: the name of one of `PACKED_BACKENDS` or `DENSE_BACKENDS`, whichever the weights are.
        changes: low-rank changes of both projections, if there are any; differentiable in their factors.

    Returns:
        `[T, H]`, in the dtype of `x`.

    Raises:
        ValueError: shapes do not fit each other, or tensors lie on several devices.

    Example:
        >>> gate_up, down = DenseWeights(torch.randn(4, 64, 96)), DenseWeights(torch.randn(4, 48, 64))
        >>> indices, routing_weights = torch.randint(0, 4, (7, 2)), torch.rand(7, 2)
        >>> x = torch.randn(7, 64)
        >>> experts(x, indices, routing_weights, gate_up, down, alpha=1.702, limit=7.0, backend="torch").shape
        torch.Size([7, 64])
    """
    check(x, indices, routing_weights, gate_up, down, changes)
    if under := transforms.active():
        transforms.refuse(f"backend {backend!r} of the experts", set() if backend == "reference" else under)
        return all_experts(x, indices, routing_weights, gate_up, down, alpha, limit, changes)
    tensors = (x, routing_weights, *gate_up.tensors, gate_up.bias, *down.tensors, down.bias)
    if changes == (None, None) and not needs_operator(*tensors):
        fused = kernel_of(gate_up, backend).fused_for(x, indices, gate_up)
        if fused is not None:
            return fused(x, indices, routing_weights, gate_up, down, alpha, limit)
    # The dtype is that of the tokens, whatever autocast would make of plain products.
    with torch.autocast(x.device.type, enabled=False):
        routes = _routes(indices, gate_up.shape[0], x.dtype)
        hidden = swiglu(_changed(routes.gather(x), routes, gate_up, changes[0], backend), alpha, limit, backend)
        return routes.combine(_changed(hidden, routes, down, changes[1], backend), routing_weights)


def _routes(indices: Tensor, num_experts: int, dtype: torch.dtype) -> Routes:
    if indices.is_cuda and serves(indices.device.type, dtype) and not is_traced(indices):
        return route(indices, num_experts)
    return Routes.of(indices, num_experts)


def _changed(rows: Tensor, routes: Routes, weights: ExpertWeights, change: LowRank | None, backend: str) -> Tensor:
    """The product of rows with weights, and with their low-rank change if there is one."""
    if change is None:
        return linear(rows, routes.offsets, weights, backend)
    return changed_linear(rows, routes.offsets, weights, change, backend)

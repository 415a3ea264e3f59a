"""The experts of GPT-OSS on dense or packed weights: route, group by expert, gate_up, SwiGLU, down, weighted sum."""

from __future__ import annotations

import torch
from torch import Tensor

from . import op
from .backends import DENSE_BACKENDS, PACKED_BACKENDS, ExpertsRequest, dense_kernel, packed_kernel
from .routes import Routes, needs_operator
from .weights import Dense, Packed

__all__ = ["DENSE_BACKENDS", "PACKED_BACKENDS", "Dense", "ExpertsRequest", "Packed", "Routes", "experts"]


def experts(
    x: Tensor,
    indices: Tensor,
    routing: Tensor,
    gate_up: Dense | Packed,
    down: Dense | Packed,
    *,
    alpha: float,
    limit: float,
    backend: str,
) -> Tensor:
    """The weighted sum of each token's experts. Deterministic; differentiable in all but packed weights.

    Routes to experts outside `[0, E)` add nothing. Any number of tokens, from 0 up.

    Args:
        x: `[T, H]`.
        indices: integers `[T, K]`, the experts of each token.
        routing: `[T, K]`, their weights.
        gate_up: weights [H, 2 I] per expert, gate and up interleaved.
        down: weights [I, H] per expert, stored as `gate_up` is.
        alpha: the steepness of the SwiGLU's sigmoid.
        limit: where the SwiGLU clamps.
        backend: the name of one of `PACKED_BACKENDS` or `DENSE_BACKENDS`, whichever the weights are.

    Returns:
        `[T, H]`, in the dtype of `x`.

    Example:
        >>> gate_up, down = Dense(torch.randn(4, 64, 96)), Dense(torch.randn(4, 48, 64))
        >>> indices, routing = torch.randint(0, 4, (7, 2)), torch.rand(7, 2)
        >>> x = torch.randn(7, 64)
        >>> experts(x, indices, routing, gate_up, down, alpha=1.702, limit=7.0, backend="torch").shape
        torch.Size([7, 64])
    """
    kernel = packed_kernel(backend) if isinstance(gate_up, Packed) else dense_kernel(backend)
    if kernel.whole and not needs_operator(x, routing, *gate_up.trainable, *down.trainable):
        return kernel.whole(x, indices, routing, gate_up, down, alpha, limit)
    num_experts = (gate_up.weight if isinstance(gate_up, Dense) else gate_up.blocks).shape[0]
    # The dtype is that of the tokens, whatever autocast would make of plain products.
    with torch.autocast(x.device.type, enabled=False):
        routes = Routes.of(indices, num_experts)
        rows = routes.gather(x)
        hidden = _linear(rows, routes.ends, gate_up, backend)
        activation = backend if isinstance(gate_up, Packed) else dense_kernel(backend).activation(hidden)
        hidden = op.swiglu(hidden, alpha, limit, activation)
        return routes.combine(_linear(hidden, routes.ends, down, backend), routing)


def _linear(rows: Tensor, ends: Tensor, weights: Dense | Packed, backend: str) -> Tensor:
    if isinstance(weights, Packed):
        return op.linear(rows, ends, weights, backend)
    return dense_kernel(backend).dense(rows, ends, weights)

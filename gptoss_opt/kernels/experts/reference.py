"""The experts in plain torch, one after the other: they define the semantics and run everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from .routes import of_expert
from .weights import Dense, Packed


def dense_linear(x: Tensor, ends: Tensor, weights: Dense) -> Tensor:
    """`x` [N, in] times the dense weights of each row's expert, plus its bias: [N, out]; differentiable."""
    parts, last = [], 0
    for e, begin, end in of_expert(ends):
        y = x[begin:end] @ weights.weight[e]
        parts.append(y if weights.bias is None else y + weights.bias[e])
        last = end
    # Rows of no expert: zeros, but part of the graph, as all else may be missing.
    rest = x[last:].masked_fill(x.new_ones((), dtype=torch.bool), 0) @ weights.weight[0]
    if weights.bias is not None:
        rest = rest + weights.bias[0].masked_fill(x.new_ones((), dtype=torch.bool), 0)
    return torch.cat([*parts, rest])


def packed_forward(x: Tensor, ends: Tensor, weights: Packed) -> Tensor:
    """The same with packed weights, dequantised one expert at a time."""
    y = x.new_zeros(x.shape[0], weights.scales.shape[1])
    for e, begin, end in of_expert(ends):
        y[begin:end] = x[begin:end] @ weights.expert(e, x)
        if weights.bias is not None:
            y[begin:end] += weights.bias[e]
    return y


def packed_backward(d_y: Tensor, ends: Tensor, weights: Packed) -> Tensor:
    """The gradient [N, in] for `x` of `d_y` [N, out]."""
    d_x = d_y.new_zeros(d_y.shape[0], weights.scales.shape[2] * 32)
    for e, begin, end in of_expert(ends):
        d_x[begin:end] = d_y[begin:end] @ weights.expert(e, d_y).T
    return d_x

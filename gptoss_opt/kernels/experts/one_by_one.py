"""The product with the experts' weights by torch's own, one expert after the other."""

from __future__ import annotations

from torch import Tensor

from .routes import of_expert
from .weights import ExpertWeights


def product(x: Tensor, offsets: Tensor, weights: ExpertWeights) -> Tensor:
    """`x` [N, in], sorted by expert, times the weights of each row's expert, plus its bias: [N, out]."""
    y = x.new_zeros(x.shape[0], weights.shape[2])
    for e, begin, end in of_expert(offsets):
        y[begin:end] = x[begin:end] @ weights.expert(e, x)
        if weights.bias is not None:
            y[begin:end] += weights.bias[e]
    return y


def input_gradient(d_y: Tensor, offsets: Tensor, weights: ExpertWeights) -> Tensor:
    """The gradient [N, in] for `x` of `d_y` [N, out]."""
    d_x = d_y.new_zeros(d_y.shape[0], weights.shape[1])
    for e, begin, end in of_expert(offsets):
        d_x[begin:end] = d_y[begin:end] @ weights.expert(e, d_y).T
    return d_x

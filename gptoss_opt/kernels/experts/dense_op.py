"""The products with dense weights as a torch operator, for autograd and tracing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import memory
from . import native, torch_grouped
from .routes import needs_operator, of_expert, sum_by_expert
from .weights import Dense

PRODUCTS = {"native": native, "torch": torch_grouped}
"""By backend, a module with `dense_forward(x, ends, weights)` and `dense_backward(d_y, ends, weights)`."""


@torch.library.custom_op("gptoss_opt::dense_linear", mutates_args=())
def dense_linear(x: Tensor, ends: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """`x` [N, in] times the dense weights [E, in, out] of each row's expert, plus its bias: [N, out]."""
    return PRODUCTS[backend].dense_forward(x, ends, Dense(weight, bias))


@dense_linear.register_fake
def _(x: Tensor, ends: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("gptoss_opt::dense_linear_input_gradient", mutates_args=())
def dense_linear_input_gradient(d_y: Tensor, ends: Tensor, weight: Tensor, backend: str) -> Tensor:
    """The gradient [N, in] for `x` of `d_y` [N, out]."""
    return PRODUCTS[backend].dense_backward(d_y, ends, Dense(weight))


@dense_linear_input_gradient.register_fake
def _(d_y: Tensor, ends: Tensor, weight: Tensor, backend: str) -> Tensor:
    return d_y.new_empty(d_y.shape[0], weight.shape[1])


@torch.library.custom_op("gptoss_opt::dense_linear_weight_gradient", mutates_args=())
def dense_linear_weight_gradient(d_y: Tensor, ends: Tensor, x: Tensor, num_experts: int) -> Tensor:
    """The gradient [E, in, out] for the weights of `d_y` [N, out], by torch's products, one expert after the other."""
    # As large as the weights and new in every step: written once, on huge pages.
    gradient = memory.empty((num_experts, x.shape[1], d_y.shape[1]), x.dtype, x.device)
    rows = {e: (begin, end) for e, begin, end in of_expert(ends)}
    for e in range(num_experts):
        if e in rows:
            torch.mm(x[slice(*rows[e])].T, d_y[slice(*rows[e])], out=gradient[e])
        else:
            gradient[e].zero_()
    return gradient


@dense_linear_weight_gradient.register_fake
def _(d_y: Tensor, ends: Tensor, x: Tensor, num_experts: int) -> Tensor:
    return x.new_empty(num_experts, x.shape[1], d_y.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ends, weight, bias, ctx.backend = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, ends, weight)


def _backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    x, ends, weight = ctx.saved_tensors
    of_x, _, of_weight, of_bias, _ = ctx.needs_input_grad
    d_x = dense_linear_input_gradient(d_y, ends, weight, ctx.backend) if of_x else None
    d_weight = dense_linear_weight_gradient(d_y.contiguous(), ends, x, weight.shape[0]) if of_weight else None
    d_bias = sum_by_expert(d_y, ends).to(ctx.bias_dtype) if of_bias else None
    return d_x, None, d_weight, d_bias, None


dense_linear.register_autograd(_backward, setup_context=_save)


def linear(x: Tensor, ends: Tensor, weights: Dense, backend: str) -> Tensor:
    """`dense_linear`, as an operator only where one is needed."""
    if needs_operator(x, weights.weight, weights.bias):
        return dense_linear(x, ends, weights.weight, weights.bias, backend)
    return PRODUCTS[backend].dense_forward(x, ends, weights)

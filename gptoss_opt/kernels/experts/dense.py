"""The products with dense weights as a torch operator, for autograd and tracing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import memory
from .backends import DENSE_KERNELS
from .routes import sum_by_expert
from .weights import DenseWeights


@torch.library.custom_op("gptoss_opt::dense_linear", mutates_args=())
def dense_linear(x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """`x` [N, in] times the dense weights [E, in, out] of each row's expert, plus its bias: [N, out]."""
    return DENSE_KERNELS[backend].forward(x, offsets, DenseWeights(weight, bias))


@dense_linear.register_fake
def _(x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("gptoss_opt::dense_linear_input_gradient", mutates_args=())
def dense_linear_input_gradient(d_y: Tensor, offsets: Tensor, weight: Tensor, backend: str) -> Tensor:
    """The gradient [N, in] for `x` of `d_y` [N, out]."""
    return DENSE_KERNELS[backend].backward(d_y, offsets, DenseWeights(weight))


@dense_linear_input_gradient.register_fake
def _(d_y: Tensor, offsets: Tensor, weight: Tensor, backend: str) -> Tensor:
    return d_y.new_empty(d_y.shape[0], weight.shape[1])


@torch.library.custom_op("gptoss_opt::dense_linear_weight_gradient", mutates_args=())
def dense_linear_weight_gradient(d_y: Tensor, offsets: Tensor, x: Tensor, num_experts: int) -> Tensor:
    """The gradient [E, in, out] for the weights of `d_y` [N, out], by torch's products, one expert after the other."""
    # As large as the weights and new in every step: written once, on huge pages.
    gradient = memory.empty((num_experts, x.shape[1], d_y.shape[1]), x.dtype, x.device)
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        # Without rows this gives zeros.
        torch.mm(x[begin:end].T, d_y[begin:end], out=gradient[e])
        begin = end
    return gradient


@dense_linear_weight_gradient.register_fake
def _(d_y: Tensor, offsets: Tensor, x: Tensor, num_experts: int) -> Tensor:
    return x.new_empty(num_experts, x.shape[1], d_y.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offsets, weight, bias, ctx.backend = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, offsets, weight)


def _backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    x, offsets, weight = ctx.saved_tensors
    of_x, _, of_weight, of_bias, _ = ctx.needs_input_grad
    d_x = dense_linear_input_gradient(d_y, offsets, weight, ctx.backend) if of_x else None
    d_weight = dense_linear_weight_gradient(d_y.contiguous(), offsets, x, weight.shape[0]) if of_weight else None
    d_bias = sum_by_expert(d_y, offsets).to(ctx.bias_dtype) if of_bias else None
    return d_x, None, d_weight, d_bias, None


dense_linear.register_autograd(_backward, setup_context=_save)


def linear(x: Tensor, offsets: Tensor, weights: DenseWeights, backend: str) -> Tensor:
    """`x` [N, in] times the weights of each row's expert, plus its bias: [N, out]; differentiable in all of them."""
    kernel = DENSE_KERNELS[backend]
    if kernel.as_operator(x, weights):
        return dense_linear(x, offsets, weights.weight, weights.bias, backend)
    return kernel.forward(x, offsets, weights)

"""The product with the experts' weights as a torch operator, so that autograd, torch.compile and checkpointing see one.

Packed weights are frozen. Nothing dense is kept of them for the backward pass: they are decoded again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import memory
from .backends import kernel_of
from .routes import sum_by_expert
from .weights import DenseWeights, ExpertWeights, weights_of


@torch.library.custom_op("gptoss_opt::expert_linear", mutates_args=())
def expert_linear(
    x: Tensor, offsets: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor | None, backend: str
) -> Tensor:
    """`x` [N, in] times the weights of each row's expert, plus its bias: [N, out]. Packed weights have `scales`."""
    weights = weights_of(weight, scales, bias)
    return kernel_of(weights, backend).forward(x, offsets, weights)


@expert_linear.register_fake
def _(x: Tensor, offsets: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], weights_of(weight, scales).shape[2])


@torch.library.custom_op("gptoss_opt::expert_linear_input_gradient", mutates_args=())
def expert_linear_input_gradient(
    d_y: Tensor, offsets: Tensor, weight: Tensor, scales: Tensor | None, backend: str
) -> Tensor:
    """The gradient [N, in] for `x` of `d_y` [N, out]."""
    weights = weights_of(weight, scales)
    return kernel_of(weights, backend).backward(d_y, offsets, weights)


@expert_linear_input_gradient.register_fake
def _(d_y: Tensor, offsets: Tensor, weight: Tensor, scales: Tensor | None, backend: str) -> Tensor:
    return d_y.new_empty(d_y.shape[0], weights_of(weight, scales).shape[1])


@torch.library.custom_op("gptoss_opt::expert_linear_weight_gradient", mutates_args=())
def expert_linear_weight_gradient(d_y: Tensor, offsets: Tensor, x: Tensor, num_experts: int) -> Tensor:
    """The gradient [E, in, out] for dense weights of `d_y` [N, out], by torch's products, expert by expert."""
    # As large as the weights and new in every step: written once, on huge pages.
    gradient = memory.empty((num_experts, x.shape[1], d_y.shape[1]), x.dtype, x.device)
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        # Without rows this gives zeros.
        torch.mm(x[begin:end].T, d_y[begin:end], out=gradient[e])
        begin = end
    return gradient


@expert_linear_weight_gradient.register_fake
def _(d_y: Tensor, offsets: Tensor, x: Tensor, num_experts: int) -> Tensor:
    return x.new_empty(num_experts, x.shape[1], d_y.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offsets, weight, scales, bias, ctx.backend = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, offsets, weight, scales)


def _backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    x, offsets, weight, scales = ctx.saved_tensors
    of_x, _, of_weight, _, of_bias, _ = ctx.needs_input_grad
    d_x = expert_linear_input_gradient(d_y, offsets, weight, scales, ctx.backend) if of_x else None
    d_weight = expert_linear_weight_gradient(d_y.contiguous(), offsets, x, weight.shape[0]) if of_weight else None
    d_bias = sum_by_expert(d_y, offsets).to(ctx.bias_dtype) if of_bias else None
    return d_x, None, d_weight, None, d_bias, None


expert_linear.register_autograd(_backward, setup_context=_save)


def _save_input_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    d_y, offsets, weight, scales, ctx.backend = inputs
    ctx.save_for_backward(d_y, offsets, weight, scales)


def _input_gradient_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    d_y, offsets, weight, scales = ctx.saved_tensors
    of_d_y, _, of_weight, _, _ = ctx.needs_input_grad
    of_rows = expert_linear(g.contiguous(), offsets, weight, scales, None, ctx.backend) if of_d_y else None
    d_weight = expert_linear_weight_gradient(d_y, offsets, g.contiguous(), weight.shape[0]) if of_weight else None
    return of_rows, None, d_weight, None, None


expert_linear_input_gradient.register_autograd(_input_gradient_backward, setup_context=_save_input_gradient)


def _save_weight_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    d_y, offsets, x, _ = inputs
    ctx.save_for_backward(d_y, offsets, x)


def _weight_gradient_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    d_y, offsets, x = ctx.saved_tensors
    weights = DenseWeights(g)
    reference = kernel_of(weights, "reference")
    return reference.forward(x, offsets, weights), None, reference.backward(d_y, offsets, weights), None


expert_linear_weight_gradient.register_autograd(_weight_gradient_backward, setup_context=_save_weight_gradient)


def linear(x: Tensor, offsets: Tensor, weights: ExpertWeights, backend: str) -> Tensor:
    """`expert_linear`, as an operator only where one is needed; differentiable in all but packed weights."""
    kernel = kernel_of(weights, backend)
    if kernel.as_operator(x, weights):
        return expert_linear(x, offsets, *weights.tensors, weights.bias, backend)
    return kernel.forward(x, offsets, weights)

"""The products and the activation as torch operators, so that autograd, torch.compile and checkpointing see one node.

The packed weights are frozen. Nothing dense is kept for the backward pass: the weights are decoded again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import packed_kernel
from .routes import needs_operator, sum_by_expert
from .weights import Packed


@torch.library.custom_op("gptoss_opt::packed_linear", mutates_args=())
def packed_linear(x: Tensor, ends: Tensor, blocks: Tensor, scales: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """`x` [N, in] times the packed weights of each row's expert, plus its bias: [N, out]."""
    return packed_kernel(backend).forward(x, ends, Packed(blocks, scales, bias))


@packed_linear.register_fake
def _(x: Tensor, ends: Tensor, blocks: Tensor, scales: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], scales.shape[1])


@torch.library.custom_op("gptoss_opt::packed_linear_backward", mutates_args=())
def packed_linear_backward(d_y: Tensor, ends: Tensor, blocks: Tensor, scales: Tensor, backend: str) -> Tensor:
    """The gradient [N, in] for `x` of `d_y` [N, out]."""
    return packed_kernel(backend).backward(d_y, ends, Packed(blocks, scales))


@packed_linear_backward.register_fake
def _(d_y: Tensor, ends: Tensor, blocks: Tensor, scales: Tensor, backend: str) -> Tensor:
    return d_y.new_empty(d_y.shape[0], scales.shape[2] * blocks.shape[3] * 2)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ends, blocks, scales, bias, ctx.backend = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(ends, blocks, scales)


def _linear_backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    ends, blocks, scales = ctx.saved_tensors
    d_x = packed_linear_backward(d_y, ends, blocks, scales, ctx.backend) if ctx.needs_input_grad[0] else None
    d_bias = sum_by_expert(d_y, ends).to(ctx.bias_dtype) if ctx.needs_input_grad[4] else None
    return d_x, None, None, None, d_bias, None


packed_linear.register_autograd(_linear_backward, setup_context=_save_linear)


@torch.library.custom_op("gptoss_opt::clamped_swiglu", mutates_args=())
def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float, backend: str) -> Tensor:
    """`activation.swiglu` by a kernel: [N, 2 I] to [N, I]."""
    return packed_kernel(backend).swiglu(gate_up, alpha, limit)


@clamped_swiglu.register_fake
def _(gate_up: Tensor, alpha: float, limit: float, backend: str) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.custom_op("gptoss_opt::clamped_swiglu_backward", mutates_args=())
def clamped_swiglu_backward(d_out: Tensor, gate_up: Tensor, alpha: float, limit: float, backend: str) -> Tensor:
    """The gradient [N, 2 I] for `gate_up` of `d_out` [N, I]."""
    return packed_kernel(backend).swiglu_backward(d_out, gate_up, alpha, limit)


@clamped_swiglu_backward.register_fake
def _(d_out: Tensor, gate_up: Tensor, alpha: float, limit: float, backend: str) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _save_swiglu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate_up, ctx.alpha, ctx.limit, ctx.backend = inputs
    ctx.save_for_backward(gate_up)


def _swiglu_backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    (gate_up,) = ctx.saved_tensors
    return clamped_swiglu_backward(d_out, gate_up, ctx.alpha, ctx.limit, ctx.backend), None, None, None


clamped_swiglu.register_autograd(_swiglu_backward, setup_context=_save_swiglu)


def linear(x: Tensor, ends: Tensor, weights: Packed, backend: str) -> Tensor:
    """`packed_linear`, as an operator only where one is needed."""
    if needs_operator(x, weights.bias):
        return packed_linear(x, ends, weights.blocks, weights.scales, weights.bias, backend)
    return packed_kernel(backend).forward(x, ends, weights)


def swiglu(gate_up: Tensor, alpha: float, limit: float, backend: str) -> Tensor:
    """`clamped_swiglu`, as an operator only where one is needed."""
    if needs_operator(gate_up):
        return clamped_swiglu(gate_up, alpha, limit, backend)
    return packed_kernel(backend).swiglu(gate_up, alpha, limit)

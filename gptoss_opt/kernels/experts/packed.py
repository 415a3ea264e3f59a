"""The product with packed weights as a torch operator, so that autograd, torch.compile and checkpointing see one node.

The packed weights are frozen. Nothing dense is kept for the backward pass: the weights are decoded again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import PACKED_KERNELS
from .routes import sum_by_expert
from .tracing import needs_operator
from .weights import PackedWeights


@torch.library.custom_op("gptoss_opt::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor, offsets: Tensor, blocks: Tensor, scales: Tensor, bias: Tensor | None, backend: str
) -> Tensor:
    """`x` [N, in] times the packed weights of each row's expert, plus its bias: [N, out]."""
    return PACKED_KERNELS[backend].forward(x, offsets, PackedWeights(blocks, scales, bias))


@packed_linear.register_fake
def _(x: Tensor, offsets: Tensor, blocks: Tensor, scales: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], scales.shape[1])


@torch.library.custom_op("gptoss_opt::packed_linear_backward", mutates_args=())
def packed_linear_backward(d_y: Tensor, offsets: Tensor, blocks: Tensor, scales: Tensor, backend: str) -> Tensor:
    """The gradient [N, in] for `x` of `d_y` [N, out]."""
    return PACKED_KERNELS[backend].backward(d_y, offsets, PackedWeights(blocks, scales))


@packed_linear_backward.register_fake
def _(d_y: Tensor, offsets: Tensor, blocks: Tensor, scales: Tensor, backend: str) -> Tensor:
    return d_y.new_empty(d_y.shape[0], scales.shape[2] * blocks.shape[3] * 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, offsets, blocks, scales, bias, ctx.backend = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(offsets, blocks, scales)


def _backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    offsets, blocks, scales = ctx.saved_tensors
    d_x = packed_linear_backward(d_y, offsets, blocks, scales, ctx.backend) if ctx.needs_input_grad[0] else None
    d_bias = sum_by_expert(d_y, offsets).to(ctx.bias_dtype) if ctx.needs_input_grad[4] else None
    return d_x, None, None, None, d_bias, None


packed_linear.register_autograd(_backward, setup_context=_save)


def linear(x: Tensor, offsets: Tensor, weights: PackedWeights, backend: str) -> Tensor:
    """`packed_linear`, as an operator only where one is needed."""
    if needs_operator(x, weights.bias):
        return packed_linear(x, offsets, weights.blocks, weights.scales, weights.bias, backend)
    return PACKED_KERNELS[backend].forward(x, offsets, weights)

"""All of `experts` on CUDA without gradients, in seven launches: few rows are computed faster than kernels are started.

Routes, the token of each row, rows by expert, gate and up, bias and activation, down, bias and weighted sum. Nothing
waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..gate import admit
from ..triton import why_not
from .routes import Routes
from .weights import ExpertWeights

Product = Callable[[Tensor, Tensor, Any], Tensor]
"""Rows [N, in], offsets and weights to [N, out], without the bias; rows of no expert may hold anything."""

ROUTES_PER_STEP = 1024
PAIRS_PER_PROGRAM = 1024
VALUES_PER_PROGRAM = 1024


@cache
def serves(device_type: str, dtype: torch.dtype) -> bool:
    """Whether there are kernels for such tokens."""
    return why_not(device_type, dtype) is None


def route(indices: Tensor, num_experts: int) -> Routes:
    """`Routes.of` in one launch."""
    flat = indices.reshape(-1)
    order, inverse = torch.empty(2, flat.numel(), dtype=torch.int64, device=flat.device)
    offsets = torch.empty(num_experts, dtype=torch.int32, device=flat.device)
    steps = -(-flat.numel() // ROUTES_PER_STEP)
    with torch.cuda.device_of(flat):
        _kernels().route_kernel[(num_experts + 1,)](
            flat, order, inverse, offsets, flat.numel(), steps, num_experts, BLOCK=ROUTES_PER_STEP
        )
    return Routes(order, inverse, offsets, indices.shape[-1])


def fused(
    product: Product,
    x: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    alpha: float,
    limit: float,
) -> Tensor:
    """As `experts` of this package, by one kind of product; at least one token."""
    (num_experts, hidden, two_pairs), device, shape = gate_up.shape, x.device, indices.shape
    x = admit("x", x, x.dtype, (len(x), hidden), device)
    indices = admit("indices", indices, indices.dtype, shape, device)
    routing_weights = admit("routing_weights", routing_weights, routing_weights.dtype, shape, device)
    biases = [
        None if bias is None else admit("bias", bias, bias.dtype, (num_experts, size), device)
        for bias, size in ((gate_up.bias, two_pairs), (down.bias, hidden))
    ]
    routes = route(indices, num_experts)
    rows = x.index_select(0, routes.order // routes.top_k)
    both = product(rows, routes.offsets, gate_up)
    h = x.new_empty(len(rows), two_pairs // 2)
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _kernels().bias_and_swiglu_kernel[(len(rows), -(-h.shape[1] // PAIRS_PER_PROGRAM))](
            both,
            both if biases[0] is None else biases[0],
            routes.offsets,
            h,
            num_experts,
            h.shape[1],
            float(alpha),
            float(limit),
            HAS_BIAS=biases[0] is not None,
            BLOCK=PAIRS_PER_PROGRAM,
            BLOCK_E=1 << num_experts.bit_length(),
        )
        y = product(h, routes.offsets, down)
        _kernels().combine_kernel[(len(x), -(-hidden // VALUES_PER_PROGRAM))](
            y,
            y if biases[1] is None else biases[1],
            indices,
            routes.inverse,
            routing_weights,
            out,
            num_experts,
            hidden,
            TOP_K=routes.top_k,
            HAS_BIAS=biases[1] is not None,
            BLOCK=VALUES_PER_PROGRAM,
        )
    return out


@cache
def _kernels() -> ModuleType:
    from . import fused_cuda_kernels

    return fused_cuda_kernels

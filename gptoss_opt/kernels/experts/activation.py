"""The clamped SwiGLU of GPT-OSS, and its gradient, as a torch operator.

With `gate` and `up` at the even and odd places of the last dimension, `gate` clamped to at most `limit`, `up` to
`[-limit, limit]`: `(up + 1) * gate * sigmoid(alpha * gate)` (gpt-oss model card, and its reference implementation). The
gradient is zero where a clamp holds; where a value equals its limit it is what the installed torch has: see `clamp`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..tracing import is_traced, needs_operator
from .backends import PACKED_BACKENDS, PACKED_KERNELS
from .weights import ExpertsRequest


@torch.library.custom_op("gptoss_opt::clamped_swiglu", mutates_args=())
def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float, backend: str) -> Tensor:
    """`gate_up` [N, 2 I] to [N, I]."""
    return PACKED_KERNELS[backend].swiglu(gate_up, alpha, limit)


@clamped_swiglu.register_fake
def _(gate_up: Tensor, alpha: float, limit: float, backend: str) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.custom_op("gptoss_opt::clamped_swiglu_backward", mutates_args=())
def clamped_swiglu_backward(d_h: Tensor, gate_up: Tensor, alpha: float, limit: float, backend: str) -> Tensor:
    """The gradient [N, 2 I] for `gate_up` of `d_h` [N, I]."""
    return PACKED_KERNELS[backend].swiglu_backward(d_h, gate_up, alpha, limit)


@clamped_swiglu_backward.register_fake
def _(d_h: Tensor, gate_up: Tensor, alpha: float, limit: float, backend: str) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate_up, ctx.alpha, ctx.limit, ctx.backend = inputs
    ctx.save_for_backward(gate_up)


def _backward(ctx: Any, d_h: Tensor) -> tuple[Tensor | None, ...]:
    (gate_up,) = ctx.saved_tensors
    return clamped_swiglu_backward(d_h, gate_up, ctx.alpha, ctx.limit, ctx.backend), None, None, None


clamped_swiglu.register_autograd(_backward, setup_context=_save)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    d_h, gate_up, ctx.alpha, ctx.limit, _ = inputs
    ctx.save_for_backward(d_h, gate_up)


def _second(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    plain = PACKED_KERNELS["reference"].swiglu_backward
    # Which further derivatives go through, as it is made of plain operations.
    back = torch.func.vjp(lambda d_h, gate_up: plain(d_h, gate_up, ctx.alpha, ctx.limit), *ctx.saved_tensors)[1]
    return *back(g), None, None, None


clamped_swiglu_backward.register_autograd(_second, setup_context=_save_backward)


def swiglu(gate_up: Tensor, alpha: float, limit: float, backend: str) -> Tensor:
    """`clamped_swiglu`, as an operator only where one is needed.

    A backend without an activation of its own, such as torch's grouped product, borrows that of the first one for
    packed weights that serves; while it is traced, the plain one.

    Example:
        >>> swiglu(torch.tensor([[1.0, 0.0, 100.0, 100.0]]), alpha=1.702, limit=7.0, backend="torch")
        tensor([[ 0.8458, 55.9996]])
    """
    if backend not in PACKED_KERNELS:
        backend = "reference" if is_traced(gate_up) else _first_to_serve(gate_up.device.type, gate_up.dtype)
    if needs_operator(gate_up):
        return clamped_swiglu(gate_up, alpha, limit, backend)
    return PACKED_KERNELS[backend].swiglu(gate_up, alpha, limit)


@cache
def _first_to_serve(device_type: str, dtype: torch.dtype) -> str:
    request = ExpertsRequest(device_type, dtype)
    return next(backend.name for backend in PACKED_BACKENDS if backend.why_not(request) is None)

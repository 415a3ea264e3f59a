"""The backends of the experts, in order of preference, and what each of them needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..native import why_not as why_not_native
from . import activation, dense_op, native, reference, torch_grouped, triton_packed
from .routes import add_bias, is_traced
from .weights import Dense, Packed, Weights


@dataclass(frozen=True)
class ExpertsRequest:
    """What a backend must serve: where, in which dtype, and with which sizes (hidden and intermediate)."""

    device_type: str
    dtype: torch.dtype
    sizes: tuple[int, ...] = ()


Whole = Callable[[Tensor, Tensor, Tensor, Weights, Weights, float, float], Tensor]
"""All of `experts` in one call, without gradients."""


class PackedKernel(Protocol):
    """The product with packed weights, and the activation, each with its gradient.

    Rows `x` [N, in] and `y` [N, out] are sorted by expert, those of expert `e` ending before `ends[e]`, int32 [E].
    Rows after the last end belong to no expert and give zeros. `whole` is there if one call can do all of it.
    """

    @property
    def whole(self) -> Whole | None: ...
    def forward(self, x: Tensor, ends: Tensor, weights: Packed) -> Tensor: ...
    def backward(self, d_y: Tensor, ends: Tensor, weights: Packed) -> Tensor: ...
    def swiglu(self, gate_up: Tensor, alpha: float, limit: float) -> Tensor: ...
    def swiglu_backward(self, d_out: Tensor, gate_up: Tensor, alpha: float, limit: float) -> Tensor: ...


class Triton:
    """Triton kernels: decode in registers, or dequantise for many rows."""

    name = "triton"
    only_named = False

    def why_not(self, request: ExpertsRequest) -> str | None:
        """The reason why it cannot serve, or None."""
        return triton_packed.why_not(request.device_type, request.dtype)

    whole = None

    def forward(self, x: Tensor, ends: Tensor, weights: Packed) -> Tensor:
        y = triton_packed.forward(x, ends, weights.blocks, weights.scales)
        return y if weights.bias is None else add_bias(y, ends, weights.bias)

    def backward(self, d_y: Tensor, ends: Tensor, weights: Packed) -> Tensor:
        return triton_packed.backward_input(d_y, ends, weights.blocks, weights.scales)

    def swiglu(self, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        return triton_packed.swiglu(gate_up, alpha, limit)

    def swiglu_backward(self, d_out: Tensor, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        return triton_packed.swiglu_backward(d_out, gate_up, alpha, limit)


class Native:
    """The library in C, on CPUs: decodes in registers, sums in float32."""

    name = "native"
    only_named = False

    def why_not(self, request: ExpertsRequest) -> str | None:
        """The reason why it cannot serve, or None."""
        return why_not_native(request.device_type, request.dtype)

    whole = staticmethod(native.experts)

    def forward(self, x: Tensor, ends: Tensor, weights: Packed) -> Tensor:
        return native.forward(x, ends, weights)

    def backward(self, d_y: Tensor, ends: Tensor, weights: Packed) -> Tensor:
        return native.backward(d_y, ends, weights)

    def swiglu(self, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        return native.swiglu(gate_up, alpha, limit)

    def swiglu_backward(self, d_out: Tensor, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        return native.swiglu_backward(d_out, gate_up, alpha, limit)


class Reference:
    """Plain torch, one expert at a time; dequantises packed weights. Runs everywhere."""

    name = "reference"
    only_named = False

    def why_not(self, request: ExpertsRequest) -> str | None:
        """None: it runs everywhere."""
        return None

    whole = None

    def forward(self, x: Tensor, ends: Tensor, weights: Packed) -> Tensor:
        return reference.packed_forward(x, ends, weights)

    def backward(self, d_y: Tensor, ends: Tensor, weights: Packed) -> Tensor:
        return reference.packed_backward(d_y, ends, weights)

    def swiglu(self, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        return activation.swiglu(gate_up, alpha, limit)

    def swiglu_backward(self, d_out: Tensor, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        return activation.swiglu_backward(d_out, gate_up, alpha, limit)

    def dense(self, x: Tensor, ends: Tensor, weights: Dense) -> Tensor:
        return reference.dense_linear(x, ends, weights)

    def activation(self, gate_up: Tensor) -> str:
        return "reference"


class NativeDense:
    """The library in C on dense weights: bfloat16 on a CPU with AVX-512 BF16."""

    name = "native"
    only_named = False

    def why_not(self, request: ExpertsRequest) -> str | None:
        """The reason why it cannot serve, or None."""
        return native.why_not_dense(request.device_type, request.dtype, request.sizes)

    whole = staticmethod(native.experts)

    def dense(self, x: Tensor, ends: Tensor, weights: Dense) -> Tensor:
        return dense_op.linear(x, ends, weights, "native")

    def activation(self, gate_up: Tensor) -> str:
        return "native"


class TorchGrouped:
    """torch's grouped_mm on dense weights; the activation in one pass by a kernel, where there is one."""

    name = "torch"
    only_named = False

    def why_not(self, request: ExpertsRequest) -> str | None:
        """The reason why it cannot serve, or None."""
        return torch_grouped.why_not(request.device_type, request.dtype, request.sizes)

    whole = None

    def dense(self, x: Tensor, ends: Tensor, weights: Dense) -> Tensor:
        # torch traces its own product, and has it without memory, in bfloat16 only.
        if x.dtype != torch.bfloat16 and is_traced(x):
            return dense_op.linear(x, ends, weights, "torch")
        return torch_grouped.dense_forward(x, ends, weights)

    def activation(self, gate_up: Tensor) -> str:
        if is_traced(gate_up):
            return "reference"
        request = ExpertsRequest(gate_up.device.type, gate_up.dtype)
        return next(backend.name for backend in PACKED_BACKENDS if backend.why_not(request) is None)


class DenseKernel(Protocol):
    """The product with dense weights, differentiable, and which packed backend's activation goes with it.

    `whole` is there if one call can do all of it.
    """

    @property
    def whole(self) -> Whole | None: ...
    def dense(self, x: Tensor, ends: Tensor, weights: Dense) -> Tensor: ...
    def activation(self, gate_up: Tensor) -> str: ...


PACKED_BACKENDS = (Triton(), Native(), Reference())
DENSE_BACKENDS = (NativeDense(), TorchGrouped(), Reference())


def packed_kernel(name: str) -> PackedKernel:
    """The kernel of a backend for packed weights."""
    return next(backend for backend in PACKED_BACKENDS if backend.name == name)


def dense_kernel(name: str) -> DenseKernel:
    """The kernel of a backend for dense weights."""
    return next(backend for backend in DENSE_BACKENDS if backend.name == name)

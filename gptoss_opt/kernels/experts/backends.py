"""The backends of the experts, in order of preference, and what each of them offers."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .impl.native import NATIVE, NATIVE_DENSE
from .impl.reference import REFERENCE, REFERENCE_DENSE, ReferenceDense
from .impl.torch_grouped import ROW_BYTES as ROW_BYTES
from .impl.torch_grouped import TORCH_GROUPED, TorchGrouped
from .impl.triton import TRITON
from .weights import ExpertsRequest, ExpertWeights, Fused, PackedWeights

PACKED_BACKENDS = (TRITON, NATIVE, REFERENCE)
TORCH_BACKENDS = (TORCH_GROUPED, REFERENCE_DENSE)
"""Those for dense weights that are made of torch alone; the first takes rows of whole units, of `ROW_BYTES`."""
DENSE_BACKENDS = (NATIVE_DENSE, *TORCH_BACKENDS)


class Kernel(Protocol):
    """The product with weights, and its gradient for the rows.

    Rows `x` [N, in] and `y` [N, out] are sorted by expert, those of expert `e` ending before `offsets[e]`, int32 [E].
    Rows after the last offset belong to no expert and give zeros. `fused_for` gives what does all of `experts` in one
    call for these tokens, routes and weights of gate and up, without gradients; None if nothing does.
    `as_operator` says whether a call must go through the operator of `linear`; otherwise it needs no gradient, or
    autograd differentiates `forward` itself. `why_waits` says why a product waits for a GPU, or None: what waits can be
    in no CUDA graph.
    """

    def fused_for(self, x: Tensor, indices: Tensor, weights: Any) -> Fused | None: ...
    def as_operator(self, x: Tensor, weights: Any) -> bool: ...
    def why_waits(self, dtype: torch.dtype, device: torch.device) -> str | None: ...
    def forward(self, x: Tensor, offsets: Tensor, weights: Any) -> Tensor: ...
    def backward(self, d_y: Tensor, offsets: Tensor, weights: Any) -> Tensor: ...


class PackedKernel(Kernel, Protocol):
    """The product with packed weights, and the activation, with its gradient as well."""

    def swiglu(self, gate_up: Tensor, alpha: float, limit: float) -> Tensor: ...
    def swiglu_backward(self, d_h: Tensor, gate_up: Tensor, alpha: float, limit: float) -> Tensor: ...


PACKED_KERNELS: dict[str, PackedKernel] = {backend.name: backend for backend in PACKED_BACKENDS}
DENSE_KERNELS: dict[str, Kernel] = {backend.name: backend for backend in DENSE_BACKENDS}


def kernel_of(weights: ExpertWeights, backend: str) -> Kernel:
    """The kernel of a backend for these weights."""
    return PACKED_KERNELS[backend] if isinstance(weights, PackedWeights) else DENSE_KERNELS[backend]


def torch_backend(request: ExpertsRequest) -> TorchGrouped | ReferenceDense:
    """The backend of dense weights that is made of torch alone and serves a request."""
    return next(one for one in TORCH_BACKENDS if one.why_not(request) is None)

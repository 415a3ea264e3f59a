"""The backends of the experts, in order of preference, and what each of them offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor

from .impl.native import NATIVE, NATIVE_DENSE
from .impl.reference import REFERENCE, REFERENCE_DENSE
from .impl.torch_grouped import TORCH_GROUPED
from .impl.triton import TRITON
from .weights import DenseWeights, ExpertWeights, PackedWeights

PACKED_BACKENDS = (TRITON, NATIVE, REFERENCE)
DENSE_BACKENDS = (NATIVE_DENSE, TORCH_GROUPED, REFERENCE_DENSE)

Weights = TypeVar("Weights", contravariant=True)
Fused = Callable[[Tensor, Tensor, Tensor, ExpertWeights, ExpertWeights, float, float], Tensor]
"""All of `experts` in one call, without gradients."""


class Kernel(Protocol[Weights]):
    """The product with weights, and its gradient for the rows.

    Rows `x` [N, in] and `y` [N, out] are sorted by expert, those of expert `e` ending before `offsets[e]`, int32 [E].
    Rows after the last offset belong to no expert and give zeros. `fused` is there if one call can do all of it.
    """

    @property
    def fused(self) -> Fused | None: ...
    def forward(self, x: Tensor, offsets: Tensor, weights: Weights) -> Tensor: ...
    def backward(self, d_y: Tensor, offsets: Tensor, weights: Weights) -> Tensor: ...


class PackedKernel(Kernel[PackedWeights], Protocol):
    """The product with packed weights, and the activation, with its gradient as well."""

    def swiglu(self, gate_up: Tensor, alpha: float, limit: float) -> Tensor: ...
    def swiglu_backward(self, d_h: Tensor, gate_up: Tensor, alpha: float, limit: float) -> Tensor: ...


class DenseKernel(Kernel[DenseWeights], Protocol):
    """The product with dense weights.

    `as_operator` says whether a call must go through the operator of `dense`; otherwise autograd differentiates
    `forward` itself.
    """

    def as_operator(self, x: Tensor, weights: DenseWeights) -> bool: ...


PACKED_KERNELS: dict[str, PackedKernel] = {backend.name: backend for backend in PACKED_BACKENDS}
DENSE_KERNELS: dict[str, DenseKernel] = {backend.name: backend for backend in DENSE_BACKENDS}

"""What a backend is asked for, and what it multiplies with: the experts' weights of one projection, dense or packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..mxfp4.format import BLOCK, unpack


@dataclass(frozen=True)
class ExpertsRequest:
    """What a backend must serve: where, in which dtype, and with which sizes (hidden and intermediate)."""

    device_type: str
    dtype: torch.dtype
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class DenseWeights:
    """Weights in the layout of transformers.

    Attributes:
        weight: `[E, in, out]`.
        bias: `[E, out]`.
    """

    weight: Tensor
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """E, in and out."""
        return self.weight.shape

    @property
    def tensors(self) -> tuple[Tensor, None]:
        """The weights as `weights_of` takes them."""
        return self.weight, None

    def expert(self, index: int, like: Tensor) -> Tensor:
        """The weights of one expert `[in, out]`, which must be in the dtype of `like` already."""
        return self.weight[index]


@dataclass(frozen=True)
class PackedWeights:
    """MXFP4 weights in the layout of the released checkpoints.

    Attributes:
        blocks: uint8 `[E, out, in / 32, 16]`.
        scales: uint8 `[E, out, in / 32]`.
        bias: `[E, out]`.
    """

    blocks: Tensor
    scales: Tensor
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """E, in and out."""
        num_experts, num_out, num_blocks = self.scales.shape
        return num_experts, num_blocks * BLOCK, num_out

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The weights as `weights_of` takes them."""
        return self.blocks, self.scales

    def expert(self, index: int, like: Tensor) -> Tensor:
        """The weights of one expert `[in, out]`, in the dtype of `like`."""
        return unpack(self.blocks[index], self.scales[index], like.dtype).T


ExpertWeights = DenseWeights | PackedWeights
Fused = Callable[[Tensor, Tensor, Tensor, ExpertWeights, ExpertWeights, float, float], Tensor]
"""All of `experts` in one call: tokens, indices, routing weights, both projections, alpha and limit."""


def weights_of(weight: Tensor, scales: Tensor | None, bias: Tensor | None = None) -> ExpertWeights:
    """Packed weights if there are scales, else dense ones."""
    return DenseWeights(weight, bias) if scales is None else PackedWeights(weight, scales, bias)

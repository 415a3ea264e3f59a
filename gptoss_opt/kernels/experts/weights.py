"""What the kernels multiply with: the experts' weights of one projection, dense or packed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..mxfp4.format import unpack


@dataclass(frozen=True)
class Dense:
    """Weights in the layout of transformers.

    Attributes:
        weight: `[E, in, out]`.
        bias: `[E, out]`.
    """

    weight: Tensor
    bias: Tensor | None = None

    @property
    def trainable(self) -> tuple[Tensor | None, ...]:
        """What may take gradients."""
        return self.weight, self.bias


@dataclass(frozen=True)
class Packed:
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
    def trainable(self) -> tuple[Tensor | None, ...]:
        """What may take gradients."""
        return (self.bias,)

    def expert(self, index: int, like: Tensor) -> Tensor:
        """The weights of one expert `[in, out]`, in the dtype of `like`."""
        return unpack(self.blocks[index], self.scales[index], like.dtype).T


Weights = Dense | Packed

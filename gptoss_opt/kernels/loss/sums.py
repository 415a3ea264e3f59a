"""Memory that all chunks use in turn, and sums in higher precision, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import memory

BLOCK = 1 << 20
"""How many values are cast or added at a time: what is in between takes no memory to speak of."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which softmaxes and sums are computed."""
    return torch.promote_types(dtype, torch.float32)


class Buffer:
    """Memory that is used again and again. The first tensor in it is the largest."""

    def __init__(self) -> None:
        self.whole: Tensor | None = None

    def of(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor in this memory, with whatever is there."""
        if self.whole is None:
            self.whole = memory.empty(shape, dtype, device)
        return self.whole[: shape[0]]

    def copy(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor in this memory, with the values of `x`."""
        return self.of(x.shape, dtype, x.device).copy_(x)


def added(total: Tensor | None, part: Tensor) -> Tensor:
    """`total + part`, in float32 or float64, written to `total` where there is one."""
    if total is None:
        return memory.empty(part.shape, wide(part.dtype), part.device).copy_(part)
    for to, block in _blocks(total, part):
        to.add_(block)
    return total


def added_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """`total + a.T @ b`, in float32 or float64, written to `total` where there is one. The product is never there."""
    first, size = total is None, max(BLOCK // b.shape[1], 1)
    b = b.float() if b.dtype == torch.float16 else b  # whose range sums over many rows leave
    if total is None:
        total = memory.empty((a.shape[1], b.shape[1]), wide(b.dtype), b.device)
    with torch.autocast(b.device.type, enabled=False):
        for to, columns in zip(total.split(size), a.split(size, 1), strict=True):
            product = torch.mm(columns.T.to(b.dtype), b)
            to.copy_(product) if first else to.add_(product)
    return total


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """`factor * x` in another dtype, in the memory of `x` where that may be and it fits."""
    if in_place and x.dtype == dtype and x.is_contiguous():
        return x.mul_(factor.view(()))
    y = memory.empty(x.shape, dtype, x.device)
    for to, block in _blocks(y, x):
        torch.mul(block, factor.view(()), out=to)
    return y


def _blocks(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The values of two tensors, `x` to be written to: in blocks, unless nothing has to be cast in between."""
    size = max(x.numel(), 1) if x.dtype == y.dtype else BLOCK
    return zip(x.view(-1).split(size), y.reshape(-1).split(size), strict=True)

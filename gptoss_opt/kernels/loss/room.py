"""Memory that all chunks use in turn, and sums in higher precision, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import memory

BLOCK = 1 << 20
"""How many values are cast or added at a time: what is in between takes no memory to speak of."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which softmaxes and sums are computed."""
    return torch.promote_types(dtype, torch.float32)


class Room:
    """Memory for the logits of one chunk: one tensor for each dtype, of which the first chunk is the largest."""

    def __init__(self) -> None:
        self.rooms: dict[torch.dtype, Tensor] = {}

    def of(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The tensor of a dtype, with whatever is in it."""
        if dtype not in self.rooms:
            self.rooms[dtype] = memory.empty(shape, dtype, device)
        return self.rooms[dtype][: shape[0]]

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor of a dtype, with the values of `x`, which may lie in it already."""
        room = self.of(x.shape, dtype, x.device)
        return room if room.data_ptr() == x.data_ptr() else room.copy_(x)


def added(total: Tensor | None, part: Tensor) -> Tensor:
    """`total + part`, in float32 or float64, written to `total` where there is one."""
    if total is None:
        return memory.empty(part.shape, wide(part.dtype), part.device).copy_(part)
    for to, block in zip(total.view(-1).split(BLOCK), part.reshape(-1).split(BLOCK), strict=True):
        to.add_(block)
    return total


def added_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """`total + a.T @ b`, in float32 or float64, written to `total` where there is one. The product is never there."""
    first, size = total is None, max(BLOCK // b.shape[1], 1)
    if total is None:
        total = memory.empty((a.shape[1], b.shape[1]), wide(b.dtype), b.device)
    for to, columns in zip(total.split(size), a.split(size, 1), strict=True):
        product = torch.mm(columns.T, b)
        to.copy_(product) if first else to.add_(product)
    return total


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`factor * x` in another dtype."""
    y = memory.empty(x.shape, dtype, x.device)
    for to, block in zip(y.view(-1).split(BLOCK), x.reshape(-1).split(BLOCK), strict=True):
        torch.mul(block, factor, out=to)
    return y

"""How a parameter is stored as tensors, and which slice of it a rank holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

Part = range | tuple[int, ...]
"""Ascending indices along one dimension."""


@dataclass(frozen=True, order=True)
class Split:
    """One dimension of a parameter, spread over the ranks of an axis.

    Attributes:
        dim: the dimension.
        axis: the name of the axis.
        parts: the indices that each rank holds, by its coordinate on the axis. Each index is in one of them.
        gives_way: whether it holds only as long as no other split of the parameter is over the same axis.
        by: the wrapper that asked for it.
    """

    dim: int
    axis: str
    parts: tuple[Part, ...]
    gives_way: bool = field(default=False, compare=False)
    by: str = field(default="", compare=False)

    @property
    def size(self) -> int:
        """The size of the whole dimension."""
        return sum(map(len, self.parts))


@dataclass(frozen=True)
class Stored:
    """A parameter as its storage holds it.

    Attributes:
        tensors: its tensors by the suffix of their names, such as `{"_blocks": ..., "_scales": ...}`.
        sqnr: how exact they are, as signal-to-quantisation-noise ratio in dB; infinite where exact.
    """

    tensors: Mapping[str, Tensor]
    sqnr: float = float("inf")


class Sliced(Protocol):
    """A tensor, or what gives its slices along the first dimension one by one, such as a tensor still in a file."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def device(self) -> torch.device: ...
    def __getitem__(self, index: int, /) -> Tensor: ...


class Storage:
    """A way to hold a parameter as one tensor or more; this one is dense: the parameter as it is.

    Attributes:
        name: what layouts call it.
        suffixes: what is added to the parameter's name, for each of its tensors.
        kind: the class of its tensors, as parameters of a model that one process holds.
    """

    name: str = "dense"
    suffixes: tuple[str, ...] = ("",)
    kind: type[nn.Parameter] = nn.Parameter

    def why_not(self, shape: Sequence[int]) -> str | None:
        """Return the reason why a parameter of this shape cannot be stored so, as a sentence, or None."""
        return None

    def encode(self, dense: Sliced) -> Stored:
        """Store dense values."""
        assert isinstance(dense, Tensor)
        return Stored({"": dense})

    def decode(self, tensors: Mapping[str, Sliced], dtype: torch.dtype) -> Tensor:
        """Restore the dense values, in `dtype`."""
        dense = tensors[""]
        assert isinstance(dense, Tensor)
        return dense

    def split(self, split: Split) -> Split:
        """Say where a split of the dense parameter falls in the stored tensors; `ValueError` if it tears a value."""
        return split

    def described(self, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of a parameter of this shape, by suffix, on the meta device."""
        return {"": torch.empty(tuple(shape), dtype=dtype, device="meta")}

    def num_bytes(self, num_values: int, itemsize: int) -> int:
        """Count the bytes of `num_values` values that take `itemsize` bytes each when dense."""
        return num_values * itemsize


DENSE = Storage()
STORAGES: dict[str, Storage] = {DENSE.name: DENSE}
"""Every storage by name: how a layout, which is plain data, finds it."""


def take(tensor: Tensor, index: Mapping[int, Part]) -> Tensor:
    """Slice a tensor: the given indices of some dimensions. The result is a view where they are ranges.

    Example:
        >>> take(torch.arange(6).view(2, 3), {0: (1,), 1: range(0, 2)})
        tensor([[3, 4]])
    """
    for dim, part in index.items():
        if isinstance(part, range):
            tensor = tensor.narrow(dim, part.start, len(part))
        else:
            tensor = tensor.index_select(dim, torch.tensor(part, device=tensor.device))
    return tensor

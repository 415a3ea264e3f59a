"""The softmax over a vocabulary of which several processes may compute a part each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .sums import Buffer, wide

BYTES, BYTES_ON_CPU = 1 << 26, 1 << 23
"""What the logits of all processes take, at most, that are in float32 at a time. A CPU then has them in its cache."""


class Vocabulary(Protocol):
    """A vocabulary of which several processes may compute a part of the logits each."""

    @property
    def mine(self) -> range:
        """The token ids whose logits this process computes."""
        ...

    @property
    def size(self) -> int:
        """How many token ids there are in all."""
        ...

    def max(self, x: Tensor) -> Tensor:
        """The largest of what all processes found, element by element."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """The sum of what all processes found."""
        ...


@dataclass(frozen=True)
class Whole:
    """A vocabulary that this process has to itself."""

    size: int

    @property
    def mine(self) -> range:
        """All token ids."""
        return range(self.size)

    def max(self, x: Tensor) -> Tensor:
        """What is found here is the largest."""
        return x

    def sum(self, x: Tensor) -> Tensor:
        """What is found here is all there is."""
        return x


def check_labels(labels: Tensor, size: int) -> None:
    """Raise `IndexError` if a label is outside a vocabulary of this size."""
    lowest, highest = map(int, labels.aminmax()) if len(labels) else (0, 0)
    if lowest < 0 or highest >= size:
        label = lowest if lowest < 0 else highest
        raise IndexError(f"label {label} is outside the vocabulary of {size}, and is not ignored.")


def cross_entropy(
    logits: Tensor, labels: Tensor, vocabulary: Vocabulary, buffer: Buffer, scale: Tensor | None = None
) -> Tensor:
    """The sum over rows of the cross entropy of logits [C, V].

    With a `scale` the logits become that times their gradient. The softmax is computed in float32 (float64 for
    float64), in the memory of `buffer`, some rows at a time.
    """
    rows = max((BYTES_ON_CPU if logits.device.type == "cpu" else BYTES) // (4 * vocabulary.size), 1)
    total = torch.zeros((), dtype=wide(logits.dtype), device=logits.device)
    for some, of_some in zip(logits.split(rows), labels.split(rows), strict=True):
        in_place = scale is not None and some.dtype == total.dtype
        x = some if in_place else buffer.copy(some, total.dtype)
        total += _cross_entropy(x, of_some, vocabulary, scale)
        if scale is not None and not in_place:
            some.copy_(x)
    return total


def _cross_entropy(logits: Tensor, labels: Tensor, vocabulary: Vocabulary, scale: Tensor | None) -> Tensor:
    """The cross entropy of logits in float32 or float64, which are written over.

    Each process has the logits of its part of the vocabulary; they exchange a maximum and two sums per row.
    """
    own = labels[:, None] - vocabulary.mine.start
    here = (own >= 0) & (own < logits.shape[-1])
    own = own.where(here, 0)
    top = vocabulary.max(logits.amax(-1, keepdim=True))
    picked = logits.gather(-1, own).where(here, 0)
    logits.sub_(top).exp_()
    sums, picked = vocabulary.sum(torch.cat([logits.sum(-1, keepdim=True), picked], -1)).split(1, -1)
    if scale is not None:
        logits.mul_(scale / sums)
        logits.scatter_add_(-1, own, -scale * here)
    return (top + sums.log() - picked).sum()

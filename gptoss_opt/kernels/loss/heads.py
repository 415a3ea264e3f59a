"""Two kinds of heads: a product with one weight, and any function, through which autograd goes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .sums import Buffer, added, added_product

Function = Callable[..., Tensor]
"""Computes the logits [C, V] of rows [C, H] with weights: `head(rows, *weights)`."""


class Head(Protocol):
    """What makes logits of one chunk after the other, and goes back from their gradients.

    Attributes:
        sums: for each weight, the sum of its gradients over chunks; None where it has none.
    """

    sums: list[Tensor | None]

    def logits(self, rows: Tensor) -> Tensor:
        """The logits [C, V] of rows [C, H], which may be written over if anything is to go back."""
        ...

    def back(self, d_logits: Tensor) -> Tensor | None:
        """The gradient of these rows, if it is wanted, by that of their logits. Adds those of weights to the sums."""
        ...


class Product:
    """`rows @ weight.T`, in the dtype of autocast where that is on."""

    def __init__(self, weight: Tensor, num_chunks: int, needed: Sequence[bool]) -> None:
        device = weight.device.type
        self.cast = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
        self.weight = weight.to(torch.get_autocast_dtype(device)) if self.cast else weight
        self.single, self.buffer = num_chunks == 1, Buffer()
        self.of_rows, self.of_weight = needed
        self.sums: list[Tensor | None] = [None]

    def logits(self, rows: Tensor) -> Tensor:
        self.rows = rows.to(self.weight.dtype) if self.cast else rows
        out = self.buffer.of((len(rows), len(self.weight)), self.weight.dtype, rows.device)
        return torch.mm(self.rows, self.weight.T, out=out)

    def back(self, d_logits: Tensor) -> Tensor | None:
        # A sum over many rows may leave the range of float16; added_product makes it in float32.
        if self.of_weight and self.single and d_logits.dtype != torch.float16:
            self.sums = [torch.mm(d_logits.T, self.rows)]
        elif self.of_weight:
            self.sums = [added_product(self.sums[0], d_logits, self.rows)]
        return torch.mm(d_logits, self.weight) if self.of_rows else None


class Composed:
    """Any function of rows and weights."""

    def __init__(self, function: Function, weights: Sequence[Tensor], num_chunks: int, needed: Sequence[bool]) -> None:
        self.function, self.single, self.training = function, num_chunks == 1, any(needed)
        self.of_rows, *of_weights = needed
        # Leaves of their own: what hangs on the weights themselves, such as hooks, is for the gradient of the loss.
        self.weights = [w.detach().requires_grad_(is_needed) for w, is_needed in zip(weights, of_weights, strict=True)]
        self.sums: list[Tensor | None] = [None] * len(weights)
        self.buffer, self.seen = Buffer(), False

    def logits(self, rows: Tensor) -> Tensor:
        self.rows = rows.detach().requires_grad_(self.of_rows)
        # Hooks that keep saved tensors elsewhere, or compute them again, are for what outlives the forward.
        with torch.set_grad_enabled(self.training), saved_tensors_hooks(_same, _same):
            self.last = self.function(self.rows, *self.weights)
        if not self.seen:
            _refuse_others(self.last, (self.rows, *self.weights))
            self.seen = True
        logits = self.last.detach()
        # The function may go back through its own output.
        return self.buffer.copy(logits, logits.dtype) if self.training else logits

    def back(self, d_logits: Tensor) -> Tensor | None:
        trained = [number for number, weight in enumerate(self.weights) if weight.requires_grad]
        inputs = [*(self.weights[number] for number in trained), *([self.rows] if self.of_rows else ())]
        with torch.autocast(d_logits.device.type, enabled=False):
            found = torch.autograd.grad(self.last, inputs, d_logits, allow_unused=True)
        for number, part in zip(trained, found, strict=False):
            if part is not None:
                self.sums[number] = part if self.single else added(self.sums[number], part)
        return found[-1] if self.of_rows else None


def _same(x: Tensor) -> Tensor:
    return x


def _refuse_others(logits: Tensor, known: Sequence[Tensor]) -> None:
    """Raise `ValueError` if logits depend on a leaf that takes gradients and is not known: it would get none."""
    seen, ahead = set[Any](), [logits.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and not any(leaf is one for one in known):
            raise ValueError(
                f"the head computes with a tensor {list(leaf.shape)} that takes gradients and is no parameter of its "
                "own, so that a loss in chunks would leave it without. Make it a parameter of the head, or freeze it."
            )
        ahead += [before for before, _ in node.next_functions]

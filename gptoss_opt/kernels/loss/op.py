"""The loss over all chunks, and its gradients, which are computed along with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .heads import Composed, Function, Head, Product
from .sums import Buffer, scaled
from .vocabulary import Vocabulary, cross_entropy


@dataclass(frozen=True)
class Task:
    """What is to be computed.

    Attributes:
        function: the head, with its weights beside the rows; None for a product with one weight.
        rows: which rows count; None for all of them.
        labels: the labels of the rows that count.
        vocabulary: how the vocabulary is spread over processes.
        chunk: how many rows are computed at a time, at most.
        divisor: what the sum over rows is divided by, in float32 or float64.
    """

    function: Function | None
    rows: Tensor | None
    labels: Tensor
    vocabulary: Vocabulary
    chunk: int
    divisor: Tensor

    def chunks(self) -> list[tuple[Tensor | slice, Tensor]]:
        """Which rows each chunk has, and their labels. Chunks are about as large as each other."""
        num_rows = len(self.labels)
        size = -(-num_rows // -(-num_rows // self.chunk)) if num_rows else 1
        parts = [slice(begin, begin + size) for begin in range(0, num_rows, size)]
        return [(part if self.rows is None else self.rows[part], self.labels[part]) for part in parts]

    def zero(self) -> Tensor:
        """The sum over no rows."""
        return torch.zeros((), dtype=self.divisor.dtype, device=self.divisor.device)

    def head(self, weights: Sequence[Tensor], needed: Sequence[bool]) -> Head:
        """What makes logits, and goes back to rows and weights whose gradients are needed."""
        num_chunks = len(self.chunks())
        if self.function is None:
            (weight,) = weights
            return Product(weight, num_chunks, needed)
        return Composed(self.function, weights, num_chunks, needed)


def loss_of(task: Task, hidden: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The loss without gradients."""
    total, buffer = task.zero(), Buffer()
    head = task.head(weights, [False] * (1 + len(weights)))
    for rows, labels in task.chunks():
        total += cross_entropy(head.logits(hidden[rows]), labels, task.vocabulary, buffer)
    return total / task.divisor


class ChunkedCrossEntropy(torch.autograd.Function):
    """The loss, with gradients of hidden states and weights."""

    @staticmethod
    def forward(ctx: Any, task: Task, hidden: Tensor, *weights: Tensor) -> Tensor:
        # 1 / divisor as a number from a half to one and a power of two. The first is in the gradients of the logits
        # before they are rounded; the second loses nothing later, and in float16 would make them vanish now.
        scale, ctx.exponent = torch.frexp(task.divisor.reciprocal())
        ctx.dtypes, needed = [x.dtype for x in (hidden, *weights)], ctx.needs_input_grad[1:]
        total, buffer, d_hidden = task.zero(), Buffer(), torch.zeros_like(hidden) if needed[0] else None
        head = task.head(weights, needed)
        for rows, labels in task.chunks():
            logits = head.logits(hidden[rows])
            total += cross_entropy(logits, labels, task.vocabulary, buffer, scale)
            d_rows = head.back(logits)
            if d_hidden is not None and d_rows is not None:
                d_hidden[rows] = d_rows.to(d_hidden.dtype)
        if not len(task.labels):
            head.sums = [torch.zeros_like(w) if one else None for w, one in zip(weights, needed[1:], strict=True)]
        ctx.save_for_backward(d_hidden, *head.sums)
        return total / task.divisor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("a loss in chunks has no second derivatives. Compute it from all logits.")
        functorch = torch._C._functorch
        if functorch.is_functorch_wrapped_tensor(grads[0]) or functorch.is_legacy_batchedtensor(grads[0]):
            raise RuntimeError("a loss in chunks has no batched gradients. Compute it from all logits.")
        factor, saved = torch.ldexp(grads[0], ctx.exponent), ctx.saved_tensors
        # What nobody asks for again may be written over, but for what autograd gave to several weights at once.
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        of = [None if x is None else x.untyped_storage().data_ptr() for x in saved]
        ready = zip(saved, ctx.dtypes, [not kept and of.count(one) == 1 for one in of], strict=True)
        return None, *(x if x is None else scaled(x, factor, dtype, in_place=own) for x, dtype, own in ready)

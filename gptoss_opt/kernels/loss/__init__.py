"""The cross entropy of a head over a large vocabulary, in chunks: the logits of all rows are never there at once.

The gradient of a row's cross entropy by its logits is `softmax(logits) - onehot(label)`. So it is known as soon as the
logits are, and goes through the head while they are still there: each chunk's logits are made once, and none outlive
the next (as in Liger Kernel, Hsu et al. 2024). The backward pass only scales what is ready.

Legend: N rows, C rows of a chunk, H the hidden size, V the vocabulary, or the part of it that this process computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .heads import Function
from .op import ChunkedCrossEntropy, Task, loss_of
from .sums import wide
from .vocabulary import Vocabulary, Whole, check_labels

MAX_BYTES = 1 << 28
"""What the logits of a chunk take, at most, where what else is there does not take more."""

MIN_ROWS = 16
"""Fewer rows than that are never computed at a time: each chunk reads the weights of the head three times."""


def rows_of_chunk(num_words: int, num_trained: int, itemsize: int) -> int:
    """How many rows are computed at a time, so that it is fast and takes little memory.

    Gradients of weights are summed over several chunks in float32, and each value of the sum is there together with
    that of the gradient that it becomes. Half as many values of logits are no more than that beside the sum.

    Args:
        num_words: the size of the vocabulary, or of the part of it that this process computes.
        num_trained: how many values of weights take gradients.
        itemsize: the bytes of a value of the logits.

    Example:
        >>> rows_of_chunk(201088, num_trained=0, itemsize=2)
        667
        >>> rows_of_chunk(201088, num_trained=201088 * 2880, itemsize=2)
        1440
    """
    return max(MAX_BYTES // (itemsize * num_words), num_trained // (2 * num_words), MIN_ROWS)


def chunked_cross_entropy(
    head: Function | None,
    hidden: Tensor,
    labels: Tensor,
    weights: Sequence[Tensor] = (),
    *,
    vocabulary: int | Vocabulary,
    chunk: int | None = None,
    divisor: int | float | Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The cross entropy of `head(hidden)` and labels, and its gradients, without the logits of more than `chunk` rows.

    The softmax is computed in float32 (float64 for float64), as are sums over chunks; rows whose label is ignored are
    not computed at all. With several processes, all must have the same rows and labels: each then has the whole loss,
    and the part of the gradient of `hidden` that its own logits give.

    Args:
        head: gives logits [C, V] of rows [C, H]. It must compute each row by itself, and with no other tensor that
            takes gradients than the ones it is handed: rows and weights. None for `rows @ weight.T`, with one weight.
        hidden: [N, H], in any floating dtype.
        labels: int64 [N], each a token id or `ignore_index`.
        weights: what the head is handed beside rows.
        vocabulary: how many token ids there are, or how they are spread over processes.
        chunk: how many rows are computed at a time, at most; by default what `rows_of_chunk` says.
        divisor: what the sum over rows is divided by; by default the number of labels that are not ignored.
        ignore_index: the label of rows that do not count.

    Returns:
        The loss, float32 (float64 for float64); NaN if no label counts and there is no divisor.

    Raises:
        IndexError: a label is neither in the vocabulary nor ignored.
        ValueError: the head computes with a tensor that takes gradients and is not one of `weights`.

    Example:
        >>> hidden, weight = torch.randn(6, 4), torch.randn(9, 4)
        >>> labels = torch.tensor([3, 8, -100, 0, 1, 1])
        >>> loss = chunked_cross_entropy(None, hidden, labels, [weight], vocabulary=9, chunk=2)
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(hidden @ weight.T, labels))
        True
    """
    vocabulary = Whole(vocabulary) if isinstance(vocabulary, int) else vocabulary
    counted = labels != ignore_index
    rows = None if bool(counted.all()) else counted.nonzero().squeeze(-1)
    labels = labels if rows is None else labels[rows]
    check_labels(labels, vocabulary.size)
    trained = [x for x in (hidden, *weights) if x.requires_grad and torch.is_grad_enabled()]
    if chunk is None:
        num_trained = sum(x.numel() for x in trained if x is not hidden)
        chunk = rows_of_chunk(len(vocabulary.mine), num_trained, hidden.itemsize)
        # Processes whose parts differ in size take chunks of one size: they meet in each.
        chunk = -int(vocabulary.max(torch.tensor(-chunk, device=hidden.device)))
    over = torch.as_tensor(len(labels) if divisor is None else divisor, dtype=wide(hidden.dtype), device=hidden.device)
    task = Task(head, rows, labels, vocabulary, chunk, over)
    return ChunkedCrossEntropy.apply(task, hidden, *weights) if trained else loss_of(task, hidden, weights)

"""All that ranks send each other: the one place that calls torch.distributed's collectives.

Most are such that autograd sees through them. In tensor parallelism each rank computes its own part of one result from
the same input. Forward, the parts of the result are summed; backward, the parts of the input's gradient are (Shoeybi et
al. 2019, Megatron-LM, section 3, where these two are called g and f).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

Change = Callable[[Tensor], Tensor]
Observer = Callable[[str, int, Callable[[], object]], None]
"""Is told the kind of a collective and the bytes of its tensor, and makes the call that it is given."""

OBSERVERS: list[Observer] = []
"""Who is told of collectives: each makes the call of the one before it. Empty but while somebody measures."""


def _call(kind: str, tensor: Tensor, call: Callable[[], object]) -> None:
    for observer in OBSERVERS:
        call = partial(observer, kind, tensor.nbytes, call)
    call()


class _Through(torch.autograd.Function):
    """`forward(x)`, whose gradient is `backward` of the gradient that comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Change, backward: Change) -> Tensor:
        ctx.back = backward
        return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back(grads[0]), None, None


def _through(x: Tensor, forward: Change, backward: Change) -> Tensor:
    through: Tensor = _Through.apply(x, forward, backward)  # type: ignore[no-untyped-call]
    return through


def _same(x: Tensor) -> Tensor:
    return x


def _view(x: Tensor) -> Tensor:
    return x.view_as(x)


def _summed(x: Tensor, groups: Sequence[ProcessGroup], num_ranks: int = 1) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format) if num_ranks == 1 else (x / num_ranks).contiguous()
    for group in groups:
        _call("all_reduce", y, partial(distributed.all_reduce, y, group=group))
    return y


def _gathered(x: Tensor, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    padded = torch.nn.functional.pad(x, (0, max(sizes) - x.shape[-1])).contiguous()
    parts = [torch.empty_like(padded) for _ in sizes]
    _call("all_gather", padded, partial(distributed.all_gather, parts, padded, group=group))
    return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], -1)


def _sent(x: Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup) -> Tensor:
    y = x.new_empty(sum(received), *x.shape[1:])
    x = x.contiguous()
    _call("all_to_all", x, partial(distributed.all_to_all_single, y, x, list(received), list(sent), group=group))
    return y


def summed(x: Tensor, group: ProcessGroup) -> Tensor:
    """Every rank's `x`, summed, without gradient; all ranks get the sum."""
    return _summed(x.detach(), [group])


def largest(x: Tensor, group: ProcessGroup) -> Tensor:
    """The largest of every rank's `x`, element by element, without gradient; all ranks get it."""
    y = x.detach().clone(memory_format=torch.contiguous_format)
    _call("all_reduce", y, partial(distributed.all_reduce, y, distributed.ReduceOp.MAX, group=group))
    return y


def all_reduce_output(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum every rank's `x`; all ranks get the sum, and its gradient goes to each rank's `x` as it is."""
    return _through(x, partial(_summed, groups=[group]), _same)


def all_reduce_gradient(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return `x`, which is the same on all ranks; its gradient is summed over the ranks."""
    return _through(x, _view, partial(_summed, groups=[group]))


def all_gather_last(x: Tensor, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    """Put every rank's `x` side by side along the last dimension; `sizes` are their widths, by rank.

    All ranks go on with the same result and have the same gradient of it: each takes its own part.
    """
    begin = sum(sizes[: distributed.get_rank(group)])
    return _through(x, partial(_gathered, sizes=sizes, group=group), partial(_part, begin=begin, size=x.shape[-1]))


def _part(x: Tensor, begin: int, size: int) -> Tensor:
    return x.narrow(-1, begin, size).contiguous()


def mean_gradient(x: Tensor, groups: Sequence[ProcessGroup], num_ranks: int) -> Tensor:
    """Return `x`; its gradient is summed over the ranks of each group, and divided by `num_ranks`."""
    return _through(x, _view, partial(_summed, groups=groups, num_ranks=num_ranks))


def add_once(x: Tensor, here: bool) -> Tensor:
    """Return `x` if it is added `here`, else zeros, before the results of several ranks are summed up.

    Its gradient is the gradient of the sum either way, which all ranks know.
    """
    return _through(x, _view if here else torch.zeros_like, _same)


def all_to_all(x: Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup) -> Tensor:
    """Send rows of `x` [sum(sent), ...] to the ranks of a group and receive theirs; gradients go the other way.

    Args:
        x: rows for rank 0 first, then for rank 1, and so on.
        sent: how many rows go to each rank.
        received: how many come from each, as the others' `sent` have it.
        group: of `len(sent)` ranks.

    Returns:
        The rows received, `[sum(received), ...]`: the ones from rank 0 first, then from rank 1, and so on.
    """
    there = partial(_sent, sent=sent, received=received, group=group)
    return _through(x, there, partial(_sent, sent=received, received=sent, group=group))


def exchange_counts(counts: Tensor, group: ProcessGroup) -> Tensor:
    """Learn how many rows each rank of a group sends here from how many each sends to each; both int64 [ranks]."""
    arriving = torch.empty_like(counts)
    _call("all_to_all", counts, partial(distributed.all_to_all_single, arriving, counts, group=group))
    return arriving


def broadcast(tensor: Tensor, group: ProcessGroup) -> None:
    """Overwrite `tensor` with the values it has on the first rank of a group."""
    _call("broadcast", tensor, partial(distributed.broadcast, tensor, group=group, group_src=0))


def broadcast_object(value: Any, group: ProcessGroup) -> Any:
    """Return the value that the first rank of a group passes, which must be one that pickle takes."""
    values = [value]
    distributed.broadcast_object_list(values, group=group, group_src=0)
    return values[0]


def all_gather_parts(local: Tensor, shapes: Sequence[Sequence[int]], rank: int, group: ProcessGroup) -> list[Tensor]:
    """Gather the parts that the ranks of a group hold, on all of them. Parts may be uneven.

    Args:
        local: the part of this rank.
        shapes: the shape of each rank's part.
        rank: the place of this rank in the group.
        group: the ranks.
    """
    parts = [local.contiguous() if other == rank else local.new_empty(shape) for other, shape in enumerate(shapes)]
    for other, part in enumerate(parts):
        _call("broadcast", part, partial(distributed.broadcast, part, group=group, group_src=other))
    return parts


def gather_parts(local: Tensor, shapes: Sequence[Sequence[int]], rank: int, group: ProcessGroup) -> list[Tensor] | None:
    """Gather as `all_gather_parts` does, but on the first rank of the group alone; the others get None."""
    if rank:
        local = local.contiguous()
        _call("send", local, partial(distributed.send, local, group=group, group_dst=0))
        return None
    parts = [local, *(local.new_empty(shape) for shape in shapes[1:])]
    for other, part in enumerate(parts[1:], 1):
        _call("receive", part, partial(distributed.recv, part, group=group, group_src=other))
    return parts

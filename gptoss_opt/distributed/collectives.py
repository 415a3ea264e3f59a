"""All that ranks send each other: the one place that calls torch.distributed's collectives.

Most are such that autograd sees through them. In tensor parallelism each rank computes its own part of one result from
the same input. Forward, the parts of the result are summed; backward, the parts of the input's gradient are (Shoeybi et
al. 2019, Megatron-LM, section 3, where these two are called g and f).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup


class _AllReduceOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        y = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(y, group=group)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class _AllReduceGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradient = grads[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _AllGatherLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: ProcessGroup) -> Tensor:
        ctx.sizes, ctx.rank = sizes, distributed.get_rank(group)
        padded = torch.nn.functional.pad(x, (0, max(sizes) - x.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].split(ctx.sizes, -1)[ctx.rank].contiguous(), None, None


class _MeanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: list[ProcessGroup], num_ranks: int) -> Tensor:
        ctx.groups, ctx.num_ranks = groups, num_ranks
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradient = (grads[0] / ctx.num_ranks).contiguous()
        for group in ctx.groups:
            distributed.all_reduce(gradient, group=group)
        return gradient, None, None


class _AddOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, here: bool) -> Tensor:
        return x.view_as(x) if here else torch.zeros_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        y = x.new_empty(sum(received), *x.shape[1:])
        distributed.all_to_all_single(y, x.contiguous(), received, sent, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradient = _AllToAll.apply(grads[0], ctx.received, ctx.sent, ctx.group)
        return cast(Tensor, gradient), None, None, None


def all_reduce_output(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of every rank's `x`, the same on all; its gradient goes to each rank's `x` as it is."""
    return cast(Tensor, _AllReduceOutput.apply(x, group))


def all_reduce_gradient(x: Tensor, group: ProcessGroup) -> Tensor:
    """`x`, which is the same on all ranks; its gradient is the sum of every rank's."""
    return cast(Tensor, _AllReduceGradient.apply(x, group))


def all_gather_last(x: Tensor, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    """Every rank's `x` side by side along the last dimension; `sizes` are the widths, by rank.

    All ranks go on with the same result and have the same gradient of it: each takes its own part.
    """
    return cast(Tensor, _AllGatherLast.apply(x, list(sizes), group))


def mean_gradient(x: Tensor, groups: Sequence[ProcessGroup], num_ranks: int) -> Tensor:
    """`x`; its gradient is summed over the ranks of each group, and divided by `num_ranks`."""
    return cast(Tensor, _MeanGradient.apply(x, list(groups), num_ranks))


def add_once(x: Tensor, here: bool) -> Tensor:
    """`x` if it is added `here`, else zeros, where the results of several ranks are summed up.

    Its gradient is the same either way: that of the sum, which all ranks know.
    """
    return cast(Tensor, _AddOnce.apply(x, here))


def all_to_all(x: Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup) -> Tensor:
    """Rows of `x` [sum(sent), ...] to the ranks of a group, and theirs from them; gradients go the other way.

    Args:
        x: rows for rank 0 first, then for rank 1, and so on.
        sent: how many rows go to each rank.
        received: how many come from each, as the others' `sent` have it.
        group: of `len(sent)` ranks.

    Returns:
        `[sum(received), ...]`, those of rank 0 first.
    """
    return cast(Tensor, _AllToAll.apply(x, list(sent), list(received), group))


def exchange_counts(counts: Tensor, group: ProcessGroup) -> Tensor:
    """How many rows each rank of a group sends here, given how many this one sends to each; both int64 [ranks]."""
    arriving = torch.empty_like(counts)
    distributed.all_to_all_single(arriving, counts, group=group)
    return arriving


def broadcast(tensor: Tensor, group: ProcessGroup) -> None:
    """Overwrite `tensor` with that of the first rank of a group."""
    distributed.broadcast(tensor, group=group, group_src=0)


def broadcast_object(value: Any, group: ProcessGroup) -> Any:
    """What the first rank of a group gives; anything that can be pickled."""
    values = [value]
    distributed.broadcast_object_list(values, group=group, group_src=0)
    return values[0]


def all_gather_parts(local: Tensor, shapes: Sequence[Sequence[int]], rank: int, group: ProcessGroup) -> list[Tensor]:
    """The parts that the ranks of a group hold, on all of them. Parts may be uneven.

    Args:
        local: the part of this rank.
        shapes: of each rank's part.
        rank: the place of this one in the group.
        group: the ranks.
    """
    parts = [local.contiguous() if other == rank else local.new_empty(shape) for other, shape in enumerate(shapes)]
    for other, part in enumerate(parts):
        distributed.broadcast(part, group=group, group_src=other)
    return parts


def gather_parts(local: Tensor, shapes: Sequence[Sequence[int]], rank: int, group: ProcessGroup) -> list[Tensor] | None:
    """As `all_gather_parts`, on the first rank of the group; None on the others."""
    if rank:
        distributed.send(local.contiguous(), group=group, group_dst=0)
        return None
    parts = [local, *(local.new_empty(shape) for shape in shapes[1:])]
    for other, part in enumerate(parts[1:], 1):
        distributed.recv(part, group=group, group_src=other)
    return parts

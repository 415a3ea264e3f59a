"""How tokens reach experts that are spread over ranks: all ranks have all tokens, or each has its own.

Legend: T tokens of this rank, K experts per token, H values of a token, N rows that this rank's experts get.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..distributed import Region, all_to_all, exchange_counts, refuse_foreign
from ..model.experts import check_implementation

ExpertPlacement = tuple[tuple[int, ...], ...]
"""The experts of one layer that each rank holds, ascending."""


@dataclass(frozen=True, eq=False)
class PartOfExperts:
    """What this rank has of a layer's experts.

    Attributes:
        region: the ranks over which the results are summed.
        ranks: the rank of each expert, int64 [E]; None if every rank has a part of all.
        numbers: which of that rank's experts it is, int64 [E].
    """

    region: Region
    ranks: Tensor | None = None
    numbers: Tensor | None = None

    @classmethod
    @torch.inference_mode(False)
    def placed(cls, region: Region, placement: ExpertPlacement, device: torch.device) -> PartOfExperts:
        """The part that a placement gives this rank."""
        places = sorted((e, rank, n) for rank, experts in enumerate(placement) for n, e in enumerate(experts))
        table = torch.tensor([place[1:] for place in places], device=device).T.contiguous()
        return cls(region, table[0], table[1])

    def places(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The rank of each expert that is asked for, and its number there; both in the shape of `indices`."""
        assert self.ranks is not None
        assert self.numbers is not None
        # The model may have been moved since.
        return self.ranks.to(indices.device)[indices], self.numbers.to(indices.device)[indices]


def part_of_experts(
    data: PartOfExperts,
    module: nn.Module,
    inner: Callable[..., Tensor],
    hidden_states: Tensor,
    router_indices: Tensor,
    routing_weights: Tensor,
) -> Tensor:
    """The experts where ranks share their tokens: each adds what its own give, or what its part of all gives."""
    refuse_foreign(module)
    region = data.region
    if data.ranks is not None:
        check_implementation(module, "experts on other ranks", "shard_experts")
        ranks, numbers = data.places(router_indices)
        router_indices = torch.where(ranks == region.rank, numbers, -1)
    hidden_states, routing_weights = map(region.copy_to_region, (hidden_states, routing_weights))
    return region.reduce_from_region(inner(hidden_states, router_indices, routing_weights))


def dispatched(
    data: PartOfExperts,
    module: nn.Module,
    inner: Callable[..., Tensor],
    hidden_states: Tensor,
    router_indices: Tensor,
    routing_weights: Tensor,
) -> Tensor:
    """The experts where each rank has its own tokens.

    A token goes once to each rank that holds any of its experts, with their indices and weights, and what comes back is
    already summed: per token at most K rows each way, and at most one for each rank.
    """
    refuse_foreign(module)
    check_implementation(module, "experts on other ranks", "shard_experts")
    group, top_k = data.region.group, router_indices.shape[-1]
    num_ranks = group.size()
    targets, numbers = data.places(router_indices)
    wanted = torch.stack([(targets == rank).any(-1) for rank in range(num_ranks)])
    to, tokens = wanted.nonzero(as_tuple=True)
    counts = wanted.sum(-1)
    sent, received = torch.stack([counts, exchange_counts(counts, group)]).tolist()

    indices = torch.where(targets[tokens] == to[:, None], numbers[tokens], -1)
    indices = all_to_all(indices, sent, received, group)
    rows = torch.cat([hidden_states, routing_weights.to(hidden_states.dtype)], -1)[tokens]
    arrived = all_to_all(rows, sent, received, group)
    hidden, weights = arrived[:, :-top_k], arrived[:, -top_k:]
    y = all_to_all(inner(hidden.contiguous(), indices, weights.contiguous()), received, sent, group)

    # One rank after the other, so that each sum has one order.
    out = torch.zeros_like(hidden_states)
    for from_rank, of_rank in zip(torch.split(y, sent), torch.split(tokens, sent), strict=True):
        out = out.index_add(0, of_rank, from_rank)
    return out

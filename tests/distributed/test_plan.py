"""The closed form of what ranks hold, beside what they really hold."""

from __future__ import annotations

import pytest

from gptoss_opt import compose, shard_experts, shard_tensor_parallel, with_lora, with_mxfp4_experts
from gptoss_opt.planner.parameters import parameters_of
from tests.distributed.ranks import Ranks
from tests.helpers import held_by_kind, tiny_model

SHARDED = {
    "tp": compose(shard_tensor_parallel(degree=2)),
    "ep": compose(shard_experts(degree=2), with_mxfp4_experts()),
    "tp with adapters": compose(shard_tensor_parallel(degree=2), with_lora(rank=4)),
}


def largest(name: str) -> dict[str, int]:
    return held_by_kind(SHARDED[name](tiny_model()))


@pytest.mark.parametrize("name", SHARDED)
def test_parameters_of_the_fullest_rank(ranks: Ranks, name: str) -> None:
    found = parameters_of(tiny_model(), SHARDED[name]).weights
    exact = max(ranks(largest, name), key=lambda each: sum(each.values()))
    assert found == exact
    # Negative control: one process holds more.
    assert sum(found.values()) < sum(held_by_kind(tiny_model()).values())

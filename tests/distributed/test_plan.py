"""The closed form of what ranks hold, beside what they really hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptoss_opt import (
    compose,
    optimize,
    shard_experts,
    shard_tensor_parallel,
    stack_of,
    with_lora,
    with_mxfp4_experts,
)
from gptoss_opt.planner import Hardware, described
from gptoss_opt.planner.parameters import parameters_of
from gptoss_opt.testing import random_checkpoint
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


def optimized(folder: str, count: int) -> tuple[list[str], int, int]:
    hardware = Hardware(described("cpu:24GB").device, per_node=count)
    model = optimize(folder, hardware=hardware, context=64)
    return [wrapper.name for wrapper in stack_of(model)], model.plan.ranks, sum(held_by_kind(model).values())


def test_optimize_on_ranks(ranks: Ranks, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "tiny")
    for names, degree, held in ranks(optimized, str(folder), ranks.num_ranks):
        assert {"shard_tensor_parallel", "shard_experts"} & set(names)
        assert degree == ranks.num_ranks
        assert held < sum(held_by_kind(optimize(folder, context=64)).values())

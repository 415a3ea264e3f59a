"""The closed form of what ranks hold, beside what they really hold."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from pathlib import Path

import pytest
import torch

from gptoss_opt import (
    Stack,
    compose,
    optimize,
    shard_experts,
    shard_tensor_parallel,
    stack_of,
    with_lora,
    with_mxfp4_experts,
)
from gptoss_opt.planner import Hardware, described, memory
from gptoss_opt.planner.hardware import USABLE
from gptoss_opt.planner.options import options
from gptoss_opt.planner.parameters import parameters_of
from gptoss_opt.planner.target import target_of
from gptoss_opt.planner.workload import Workload
from gptoss_opt.testing import random_checkpoint
from tests.distributed.ranks import Ranks
from tests.helpers import held_by_kind, ids, relative, tiny_model

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


def on_two_axes(num_ranks: int) -> Stack:
    mesh = {"ep": num_ranks // 2, "tp": 2}
    return compose(shard_tensor_parallel(mesh=mesh), shard_experts(mesh=mesh), with_lora(rank=4))


def largest_on_two_axes(num_ranks: int) -> dict[str, int]:
    return held_by_kind(on_two_axes(num_ranks)(tiny_model()))


def test_parameters_on_two_axes(ranks: Ranks) -> None:
    found = parameters_of(tiny_model(), on_two_axes(ranks.num_ranks))
    assert found.weights == max(ranks(largest_on_two_axes, ranks.num_ranks), key=lambda each: sum(each.values()))
    assert (found.axes, found.ranks) == ({"ep": ranks.num_ranks // 2, "tp": 2}, ranks.num_ranks)


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


def optimized_on_two_nodes(folder: str) -> tuple[Stack, dict[str, int], torch.Tensor]:
    """A model for two nodes of two devices, neither of which would hold it: the stack, what is held, and logits."""
    machine, work = Hardware(described("cpu:24GB").device, per_node=2, nodes=2), Workload(context=4096)
    with pytest.MonkeyPatch.context() as patch:
        # A model as small as this takes less than what ranks keep to meet each other.
        patch.setattr(memory, "MEETING", {"cpu": 0})
        needed = next(way.memory for way in options(target_of(folder), machine, work) if "ep" in way.held.axes)
        device = replace(machine.device, memory=ceil(needed.num_bytes / USABLE["cpu"]))
        model = optimize(folder, hardware=replace(machine, device=device), context=work.context)
    return stack_of(model), held_by_kind(model), model(ids()).logits.detach()


def test_optimize_where_nodes_share_a_model(ranks: Ranks, tmp_path: Path) -> None:
    if ranks.num_ranks < 4:
        pytest.skip("two nodes of two devices take four ranks")
    folder = random_checkpoint(tmp_path / "tiny")
    alone, mesh = optimize(folder, context=64), {"ep": 2, "tp": 2}
    for stack, held, logits in ranks(optimized_on_two_nodes, str(folder)):
        assert {shard_tensor_parallel(mesh=mesh), shard_experts(mesh=mesh)} <= set(stack)
        assert held["experts"] < 0.4 * held_by_kind(alone)["experts"]
        assert relative(logits, alone(ids()).logits) < 0.02

"""Who holds what."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from gptoss_opt.distributed import balance_experts, split


def test_every_split_is_whole_even_and_in_order() -> None:
    for num_units, degree, unit in itertools.product(range(12), range(1, 9), (1, 32)):
        parts = split(num_units * unit, degree, unit=unit)
        assert [n for part in parts for n in part] == list(range(num_units * unit))
        counts = [len(part) // unit for part in parts]
        assert len(counts) == degree
        assert counts == sorted(counts, reverse=True)
        assert max(counts) - min(counts) <= 1
        assert all(part.start % unit == 0 for part in parts)


def test_the_blocks_of_the_20b_over_four_ranks() -> None:
    assert [len(part) // 32 for part in split(2880, 4, unit=32)] == [23, 23, 22, 22]


@pytest.mark.parametrize(
    ("size", "degree", "unit", "message"),
    [(8, 0, 1, "degree is 0. Use 1 or more"), (33, 2, 32, "33 is not a multiple of 32")],
)
def test_bad_splits(size: int, degree: int, unit: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(size, degree, unit=unit)


def fullest(placement: tuple[tuple[int, ...], ...], load: list[float]) -> float:
    return max(sum(load[expert] for expert in held) for held in placement)


def best(load: list[float], degree: int) -> float:
    """The fullest rank of the best placement, by trying all."""
    found = math.inf
    for ranks in itertools.product(range(degree), repeat=len(load)):
        totals = [0.0] * degree
        for rank, value in zip(ranks, load, strict=True):
            totals[rank] += value
        found = min(found, max(totals))
    return found


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_balanced_experts_are_near_the_best_placement(degree: int) -> None:
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        load = [(torch.rand(7, generator=generator) ** 4).tolist() for _ in range(2)]
        placement = balance_experts(load, degree)
        for layer, values in zip(placement, load, strict=True):
            assert sorted(expert for held in layer for expert in held) == list(range(7))
            assert all(held and list(held) == sorted(held) for held in layer)
            assert fullest(layer, values) <= (4 / 3 - 1 / (3 * degree)) * best(values, degree) + 1e-9
            assert fullest(layer, values) <= sum(values) / degree + max(values)


def test_a_skewed_load_spreads_more_evenly_than_neighbours_do() -> None:
    load = [100.0, 90.0, 80.0, 70.0, 1.0, 1.0, 1.0, 1.0]
    (placement,) = balance_experts([load], 4)
    neighbours = tuple((2 * rank, 2 * rank + 1) for rank in range(4))
    assert fullest(placement, load) == 100.0
    assert fullest(neighbours, load) == 190.0


def test_no_rank_stays_without_an_expert_whatever_the_load() -> None:
    for load in ([0.0] * 4, [5.0, 0.0, 0.0, 0.0]):
        assert all(balance_experts([load], 4)[0])


@pytest.mark.parametrize(
    ("load", "degree", "message"),
    [
        ([], 2, "give a load for each layer"),
        ([[]], 2, "give a load for each layer"),
        ([[1.0, 2.0], [1.0]], 2, "give a load for each layer"),
        ([[1.0, 2.0]], 3, "2 experts do not go on 3 ranks. Use 1 to 2"),
        ([[1.0, 2.0]], 0, "2 experts do not go on 0 ranks"),
        ([[1.0, -2.0]], 2, "a load is -2.0"),
        ([[1.0, math.nan]], 2, "a load is nan"),
        ([[1.0, math.inf]], 2, "a load is inf"),
    ],
)
def test_bad_loads(load: list[list[float]], degree: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        balance_experts(load, degree)

"""Every two wrappers either are a declared conflict, or can be stacked in any order with the same bits."""

from __future__ import annotations

from itertools import combinations

import torch

import gptoss_opt
from gptoss_opt import CompatibilityError, compose, stack_of
from gptoss_opt.core import WRAPPERS
from tests.helpers import group_of_one, ids, tiny_model

ALL = [getattr(gptoss_opt, name) for name in sorted(WRAPPERS) if hasattr(gptoss_opt, name)]


def test_pairs_conflict_or_commute() -> None:
    with group_of_one():
        _conflict_or_commute()


def _conflict_or_commute() -> None:
    for first, second in combinations(ALL, 2):
        try:
            stack = compose(first(), second())
        except CompatibilityError:
            continue
        assert compose(second(), first()) == stack
        one, two = first(second(tiny_model())), second(first(tiny_model()))
        assert stack_of(one) == stack_of(two) == stack
        assert torch.equal(one(ids()).logits, two(ids()).logits), stack


def test_a_wrapper_joined_with_itself_is_the_wrapper() -> None:
    assert compose(*(wrap() for wrap in ALL[:1])) == compose(compose(ALL[0]()), ALL[0]())

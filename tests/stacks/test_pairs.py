"""Every two and three wrappers stand together in any order, with the same bits and right logits, or are a conflict."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import gptoss_opt
from gptoss_opt import CompatibilityError, compose, explain, stack_of
from gptoss_opt.core import WRAPPERS
from gptoss_opt.core.journal import Around, SetAttribute
from gptoss_opt.core.record import record_of
from gptoss_opt.extend import Phase, Report, Wrapper
from gptoss_opt.model.attention import ATTENTION
from tests.helpers import ids, relative, tiny_model
from tests.stacks.compatibility import PAGE, page, relation
from tests.stacks.low_rank import LowRank

ALL = [getattr(gptoss_opt, name) for name in sorted(WRAPPERS) if hasattr(gptoss_opt, name)]


@dataclass(frozen=True, kw_only=True, repr=False)
class OtherAttention(Wrapper):
    """Claims what with_flash_attention claims."""

    name: ClassVar[str] = "with_toy_attention"
    phase: ClassVar[Phase] = Phase.COMPUTE
    claims: ClassVar[tuple[str, ...]] = (ATTENTION,)

    def attach(self, model: nn.Module, journal: Any) -> Report:
        return Report(())


@dataclass(frozen=True, kw_only=True, repr=False)
class Alone(Wrapper):
    """Refuses to be on several ranks, and packed experts."""

    name: ClassVar[str] = "with_toy_alone"
    phase: ClassVar[Phase] = Phase.OBSERVE
    refuses: ClassVar[dict[str, str]] = {
        "shards": "it has no others to ask. Take a whole model.",
        "packed experts": "it reads dense weights. Take with_fast_experts().",
    }

    def attach(self, model: nn.Module, journal: Any) -> Report:
        return Report(())


TOYS = (LowRank, OtherAttention, Alone)
CONFLICTS = {
    ("with_flash_attention", "with_toy_attention"),
    ("shard_experts", "with_toy_alone"),
    ("shard_tensor_parallel", "with_toy_alone"),
    ("with_mxfp4_experts", "with_toy_alone"),
    ("with_full_finetuning", "with_lora"),
    ("with_full_finetuning", "with_mxfp4_experts"),
}


@pytest.fixture(autouse=True, scope="module")
def _toys():
    for toy in TOYS:
        WRAPPERS[toy.name] = toy
    yield
    for toy in TOYS:
        WRAPPERS.pop(toy.name, None)


def small() -> Any:
    return tiny_model(num_hidden_layers=2)


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return small()(ids()).logits


def plain(wrapper: Wrapper) -> str:
    """The name of a wrapper, whatever the test calls it."""
    return wrapper.name.partition(":")[2] or wrapper.name


def threes() -> list[tuple[Any, ...]]:
    """Every three wrappers of which no two are a conflict."""
    return [
        triple
        for triple in combinations([*ALL, LowRank], 3)
        if not any((plain(one()), plain(other())) in CONFLICTS for one, other in combinations(triple, 2))
    ]


@pytest.mark.parametrize(
    "pair", list(combinations([*ALL, *TOYS], 2)), ids=lambda pair: " ".join(f.__name__ for f in pair)
)
def test_the_table_is_true_of_every_pair(pair: tuple[Any, Any], names: str, expected: Tensor) -> None:
    first, second = (make() for make in pair)
    conflict = (plain(first), plain(second)) in CONFLICTS
    assert relation(first, second).startswith("conflict") == conflict
    if conflict:
        for attempt in (lambda: compose(first, second), lambda: second(first(small()))):
            with pytest.raises(CompatibilityError, match="both claim|refuses"):
                attempt()
        return
    stack = compose(first, second)
    assert compose(second, first) == stack
    one, two = first(second(small())), second(first(small()))
    assert stack_of(one) == stack_of(two) == stack
    assert torch.equal(one(ids()).logits, two(ids()).logits), stack
    assert relative(one(ids()).logits, expected) < 1e-5
    for row, wrapper in zip(explain(one).rows, stack, strict=True):
        assert ("stands by" in row.changed[0] if row.changed else False) == (
            f"`{wrapper.name}` stands by" in relation(first, second)
        )


def test_every_three_stand_together_in_any_order(names: str, expected: Tensor) -> None:
    for triple in threes():
        found = None
        for order in list(permutations(triple))[::2]:  # each of them goes first once
            model = small()
            for wrap in order:
                model = wrap()(model)
            logits = model(ids()).logits
            found = logits if found is None else found
            assert stack_of(model) == compose(*(wrap() for wrap in triple))
            assert torch.equal(logits, found), order
        assert relative(found, expected) < 1e-5, triple


def test_no_two_wrappers_write_one_attribute(names: str) -> None:
    # What lies around a forward lies around what others put there; all else is written by one wrapper: a declared slot.
    for triple in threes():
        model = compose(*(wrap() for wrap in triple))(small())
        written: dict[tuple[str, str], str] = {}
        for applied in record_of(model).applied:
            mine = {
                (edit.path, edit.name)
                for edit in applied.edits
                if isinstance(edit, SetAttribute) and not isinstance(edit.new, Around)
            }
            for attribute in mine:
                assert written.setdefault(attribute, applied.wrapper.name) == applied.wrapper.name, attribute
            if mine:
                assert applied.wrapper.claims or applied.wrapper.yields or applied.wrapper.defaults


def test_a_wrapper_joined_with_itself_is_the_wrapper() -> None:
    assert compose(*(wrap() for wrap in ALL[:1])) == compose(compose(ALL[0]()), ALL[0]())


def test_the_page_is_what_the_wrappers_say() -> None:
    assert PAGE.read_text() == page(), "write it anew: python -m tests.stacks.compatibility"

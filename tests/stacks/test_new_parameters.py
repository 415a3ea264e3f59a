"""Parameters that a wrapper brings: made alike everywhere, kept when others come and go, gone when it is taken off."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gptoss_opt import (
    compose,
    shard_experts,
    shard_tensor_parallel,
    stack_of,
    undo,
    with_fast_experts,
    with_flash_attention,
    with_mxfp4_experts,
)
from gptoss_opt.extend import Layout, LayoutError
from tests.helpers import ids, local, relative, tiny_model
from tests.stacks.low_rank import LowRank, low_rank_parameters, train

OTHERS = (with_flash_attention, with_fast_experts, with_mxfp4_experts, shard_tensor_parallel, shard_experts)


def trained(*first: Any) -> Any:
    """A model with low-rank parameters, trained for two steps; all else is frozen."""
    model = compose(*first, LowRank())(tiny_model(num_hidden_layers=2))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".low_" in name)
    train(model, [ids(seed=3), ids(seed=4)])
    return model


def test_trained_parameters_stay_whatever_is_applied_in_whatever_order() -> None:
    base, input_ids = trained(), ids(1, 12)
    expected = base(input_ids).logits
    assert relative(tiny_model(num_hidden_layers=2)(input_ids).logits, expected) > 1e-2, "training changed nothing"
    for order in itertools.permutations(OTHERS):
        model = copy.deepcopy(base)
        values = {name: p.detach().clone() for name, p in low_rank_parameters(model).items()}
        for wrap in order:
            wrap(model)
        assert relative(model(input_ids).logits, expected) < 1e-5, order
        kept = low_rank_parameters(model)
        assert kept.keys() == values.keys()
        assert all(torch.equal(local(kept[name]), value) for name, value in values.items())
        assert all(parameter.requires_grad for parameter in kept.values())


@pytest.mark.parametrize("first", [*([wrap] for wrap in OTHERS), list(OTHERS)], ids=lambda first: first[0].__name__)
def test_added_to_a_wrapped_model_they_train_as_on_a_plain_one(first: list[Any]) -> None:
    expected = trained()(ids()).logits
    assert relative(trained(*(wrap() for wrap in first))(ids()).logits, expected) < 1e-5


def test_they_are_the_same_objects_while_others_come_and_go() -> None:
    model = trained()
    before = low_rank_parameters(model)
    with_mxfp4_experts(with_flash_attention(model))
    undo(model, with_flash_attention)
    undo(model, with_mxfp4_experts)
    after = low_rank_parameters(model)
    assert all(after[name] is parameter for name, parameter in before.items())


def test_undo_leaves_the_keys_as_they_were() -> None:
    model = tiny_model()
    keys, before = list(model.state_dict()), dict(model.named_parameters())
    logits = model(ids()).logits
    LowRank()(with_mxfp4_experts(model))
    undo(model)
    assert list(model.state_dict()) == keys
    assert all(model.get_parameter(name) is before[name] for name in keys if "experts" not in name)
    assert torch.equal(model(ids()).logits, logits)
    undo(with_flash_attention(LowRank()(model)), LowRank.name)
    assert list(model.state_dict()) == keys


def test_first_values_depend_on_the_name_alone() -> None:
    torch.manual_seed(5)
    one = LowRank()(with_flash_attention(tiny_model(seed=5)))
    torch.manual_seed(6)
    other = with_mxfp4_experts(LowRank()(tiny_model(seed=6)))
    first, second = low_rank_parameters(one), low_rank_parameters(other)
    assert all(torch.equal(first[name], second[name]) for name in first)
    drawn = [parameter for name, parameter in first.items() if name.endswith("low_A")]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2) if a.shape == b.shape)
    assert not any(parameter.any() for name, parameter in first.items() if name.endswith("low_B"))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_their_own(clone: Any) -> None:
    model = with_flash_attention(trained())
    expected = model(ids()).logits
    twin = clone(model)
    assert torch.equal(twin(ids()).logits, expected)
    with torch.no_grad():
        next(iter(low_rank_parameters(twin).values())).mul_(2)
    assert torch.equal(model(ids()).logits, expected)
    undo(twin)
    assert not low_rank_parameters(twin)
    assert stack_of(model) == compose(LowRank(), with_flash_attention())


def test_the_checkpoint_of_the_base_holds_none_of_them(tmp_path) -> None:
    for number, others in enumerate([(), (with_mxfp4_experts(),), (shard_tensor_parallel(),)]):
        model = trained(*others)
        model.save_pretrained(tmp_path / str(number))
        plain, report = AutoModelForCausalLM.from_pretrained(
            tmp_path / str(number), dtype=torch.float32, output_loading_info=True
        )
        assert not report["unexpected_keys"]
        assert relative(plain.float().eval()(ids()).logits, tiny_model(num_hidden_layers=2)(ids()).logits) < 1e-5
        if not others:
            undo(model).save_pretrained(tmp_path / "undone")
            assert model._keys_to_ignore_on_save == tiny_model()._keys_to_ignore_on_save


def test_two_wrappers_that_bring_one_parameter_are_named() -> None:
    layout = LowRank().layout(tiny_model(), compose().layout(tiny_model()))
    with pytest.raises(LayoutError, match=r"low_rank\(rank=3\) adds .*q_proj.low_A, which another wrapper has"):
        LowRank(rank=3).layout(tiny_model(), Layout(layout.asked, author=repr(LowRank(rank=3))))

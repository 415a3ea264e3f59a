"""Packed weights are codes: whoever does arithmetic on them is told, and what can be done with them still is."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from gptoss_opt import undo, with_mxfp4_experts
from tests.helpers import ids, relative, tiny_model

AVERAGES: dict[str, dict[str, Any]] = {
    "default": {},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "swa": {"multi_avg_fn": get_swa_multi_avg_fn()},
    "one by one": {"avg_fn": lambda averaged, current, _: 0.9 * averaged + 0.1 * current},
}


def numbers_only(averaged: Any, current: Any, count: Any) -> None:
    if averaged[0].is_floating_point():
        get_ema_multi_avg_fn(0.9)(averaged, current, count)


@pytest.mark.parametrize("how", AVERAGES.values(), ids=AVERAGES)
def test_averaging_codes_is_refused(how: dict[str, Any]) -> None:
    model = with_mxfp4_experts(tiny_model())
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        averaged = AveragedModel(other, **how)
        averaged.update_parameters(other)
        with pytest.raises(ValueError, match="was called on packed weights, whose bytes are codes of MXFP4"):
            averaged.update_parameters(other)
    # Dense, it averages: the refusal is of the codes.
    averaged = AveragedModel(undo(model), **how)
    for _ in range(2):
        averaged.update_parameters(model)
    assert relative(averaged(ids()).logits, model(ids()).logits) < 1e-5


def test_an_average_of_what_is_a_number() -> None:
    model = with_mxfp4_experts(tiny_model())
    averaged = AveragedModel(model, multi_avg_fn=numbers_only)
    averaged.update_parameters(model)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    averaged.update_parameters(model)
    with torch.no_grad():
        model.model.norm.weight.mul_(0.55)  # 0.9 of one and 0.1 of two are 1.1 of it
    assert relative(averaged(ids()).logits, model(ids()).logits) < 1e-5


def test_parameters_are_counted_by_their_values() -> None:
    plain, packed = tiny_model(), with_mxfp4_experts(tiny_model())
    for exclude in (False, True):
        assert packed.num_parameters(exclude_embeddings=exclude) == plain.num_parameters(exclude_embeddings=exclude)
    assert packed.model.num_parameters() == plain.model.num_parameters()
    trained = sum(p.numel() for p in packed.parameters() if p.requires_grad)
    assert packed.num_parameters(only_trainable=True) == trained < plain.num_parameters()


def test_all_but_the_codes_can_be_trained() -> None:
    model = with_mxfp4_experts(tiny_model())
    for one in (model, model.model, model.model.layers[0].mlp.experts):
        model.requires_grad_(False)
        assert one.requires_grad_(True) is one
        assert all(p.requires_grad == p.is_floating_point() for p in one.parameters())


def test_a_state_dict_needs_nothing_of_this_package(tmp_path: Any) -> None:
    model = with_mxfp4_experts(tiny_model())
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert {type(tensor) for tensor in loaded.values()} == {torch.Tensor}
    model.load_state_dict(loaded)


def test_other_computations_of_packed_experts_are_refused() -> None:
    model = with_mxfp4_experts(tiny_model())
    for one in (model, model.model):
        with pytest.raises(ValueError, match=r"set_experts_implementation\('eager'\): the experts are packed"):
            one.set_experts_implementation("eager")
    undo(model).set_experts_implementation("eager")

"""Experts across moving, casting, other wrappers, and failures: what is packed stays packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from gptoss_opt import (
    CompatibilityError,
    Wrapper,
    compose,
    explain,
    stack_of,
    undo,
    with_fast_experts,
    with_flash_attention,
    with_mxfp4_experts,
)
from gptoss_opt.core import Phase
from gptoss_opt.layout import MXFP4
from tests.helpers import ids, relative, tiny_model


def packed_tensors(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.endswith(("_blocks", "_scales"))]


def backend_of(model: nn.Module) -> str:
    return explain(model).rows[0].backend


@pytest.fixture
def moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise AssertionError("weights were moved")

    for name in ("encode", "decode"):
        monkeypatch.setattr(type(MXFP4), name, fails)


@pytest.fixture
def packed() -> Any:
    return with_mxfp4_experts(tiny_model())


def test_applied_again_after_a_cast_it_chooses_anew_and_moves_nothing(packed: Any, moves_nothing: None) -> None:
    exact, before = packed(ids()).logits, packed_tensors(packed)
    assert backend_of(packed) == "native"
    packed.double()
    with pytest.raises(ValueError, match="moved or cast after it was wrapped. Apply the wrapper again"):
        packed(ids())
    assert with_mxfp4_experts(packed) is packed
    assert backend_of(packed) == "reference"
    assert relative(packed(ids()).logits, exact) < 1e-5
    assert backend_of(with_mxfp4_experts(packed.float())) == "native"
    assert torch.equal(packed(ids()).logits, exact)
    assert all(a is b for a, b in zip(packed_tensors(packed), before, strict=True))
    # Nothing to choose anew: nothing is done.
    record = explain(packed).rows
    assert explain(with_mxfp4_experts(packed)).rows == record


def test_a_named_backend_that_serves_no_more_is_refused_and_all_stays() -> None:
    model = with_flash_attention(with_mxfp4_experts(tiny_model(), backend="native")).double()
    stack, rows, before = stack_of(model), explain(model).rows, packed_tensors(model)
    for apply in (lambda: stack(model), lambda: with_fast_experts(model)):
        with pytest.raises(CompatibilityError, match="'native' cannot serve here: takes torch.bfloat16 and"):
            apply()
        assert stack_of(model) == stack
        assert explain(model).rows == rows
    assert all(a is b for a, b in zip(packed_tensors(model), before, strict=True))


def test_other_wrappers_come_and_go_and_nothing_moves(packed: Any, moves_nothing: None) -> None:
    before = packed_tensors(packed)
    with_fast_experts(with_flash_attention(packed))
    undo(packed, with_flash_attention)
    undo(packed, with_fast_experts)
    assert all(a is b for a, b in zip(packed_tensors(packed), before, strict=True))


@dataclass(frozen=True, kw_only=True, repr=False)
class Failing(Wrapper):
    """Fails when it is attached."""

    name: ClassVar[str] = "with_toy_failure"
    phase: ClassVar[Phase] = Phase.OBSERVE

    def attach(self, model: nn.Module, journal: Any) -> Any:
        raise RuntimeError("as it should")


def test_a_failure_behind_it_leaves_the_very_dense_parameters() -> None:
    model = tiny_model()
    before, keys = dict(model.named_parameters()), list(model.state_dict())
    with pytest.raises(RuntimeError, match="as it should"):
        compose(with_mxfp4_experts(), Failing())(model)
    assert list(model.state_dict()) == keys
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert not stack_of(model)
    # And the very packed ones, where these were there before.
    with_mxfp4_experts(model)
    packed = packed_tensors(model)
    with pytest.raises(RuntimeError, match="as it should"):
        Failing()(model)
    assert all(a is b for a, b in zip(packed_tensors(model), packed, strict=True))
    assert len(stack_of(model)) == 1


def test_weights_the_user_made_dense_are_packed_again(packed: Any) -> None:
    experts = packed.model.layers[1].mlp.experts
    exact = packed(ids()).logits
    dense = MXFP4.decode(
        {suffix: experts.get_parameter(f"down_proj{suffix}") for suffix in MXFP4.suffixes}, torch.float32
    )
    del experts.down_proj_blocks, experts.down_proj_scales
    experts.down_proj = nn.Parameter(dense)
    with_mxfp4_experts(packed)
    assert not hasattr(experts, "down_proj")
    assert torch.equal(packed(ids()).logits, exact)


def test_dense_experts_cast_after_wrapping_are_refused_until_wrapped_again() -> None:
    model = with_fast_experts(tiny_model(torch.bfloat16))
    if backend_of(model) != "native":
        pytest.skip("this CPU has no AVX-512 BF16")
    model.float()
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="Apply the wrapper again"):
            model(ids())
    assert backend_of(with_fast_experts(model)) == "torch"
    assert relative(model(ids()).logits, undo(model)(ids()).logits) < 1e-5

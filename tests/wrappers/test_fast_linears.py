"""`with_fast_linears` changes how linear layers of few rows are computed, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gptoss_opt import (
    BackendError,
    CompatibilityError,
    adapters_off,
    explain,
    undo,
    with_chunked_loss,
    with_fast_linears,
    with_lora,
)
from gptoss_opt.kernels import kernel_table, native
from gptoss_opt.kernels import linear as kernel
from gptoss_opt.model import linears
from gptoss_opt.model import loss as model_loss
from tests.helpers import few_rows_native, ids, loss_and_gradients, relative, tiny_model

if native.why_not("cpu", torch.float32):
    pytest.skip("no native library here", allow_module_level=True)

PER_FORWARD = 3 * 5 + 1
"""Linear layers of the tiny model: q, k, v, o and the router in each of three layers, and the head."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of x that were computed natively, up to 8 rows."""
    found: list[tuple[int, ...]] = []
    monkeypatch.setattr(kernel_table, "measured", few_rows_native)
    real = kernel.product

    def counted(x: Tensor, *args: Any) -> Tensor:
        found.append(tuple(x.shape))
        return real(x, *args)

    monkeypatch.setattr(linears, "product", counted)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_rows_are_computed_natively(calls: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    plain, model = tiny_model(dtype), with_fast_linears(tiny_model(dtype))
    few, many = ids()[:1, :8], ids()[:1, :9]
    with torch.no_grad():
        assert relative(model(few).logits, plain(few).logits) < (1e-5 if dtype == torch.float32 else 3e-2)
        assert len(calls) == PER_FORWARD
        assert relative(model(many).logits, plain(many).logits) < (1e-5 if dtype == torch.float32 else 3e-2)
        assert len(calls) == PER_FORWARD
    undo(model)
    with torch.no_grad():
        assert torch.equal(model(few).logits, plain(few).logits)


def test_generate_gives_the_same_tokens(calls: list[tuple[int, ...]]) -> None:
    prompt, options = ids()[:2], {"max_new_tokens": 8, "do_sample": False}
    expected = tiny_model().generate(prompt, **options)
    assert torch.equal(with_fast_linears(tiny_model()).generate(prompt, **options), expected)
    assert len(calls) >= 7 * PER_FORWARD


def test_training_is_torchs_own(calls: list[tuple[int, ...]]) -> None:
    few = ids()[:1, :8]
    loss, gradients = loss_and_gradients(with_fast_linears(tiny_model()), few)
    exact, expected = loss_and_gradients(tiny_model(), few)
    assert torch.equal(loss, exact)
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert not calls


def test_adapters_are_added_to_what_it_computes(calls: list[tuple[int, ...]]) -> None:
    def adapted(model: Any) -> Any:
        model = with_lora(model, targets=("q_proj", "o_proj", "lm_head"))
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B"):
                    parameter.normal_()
        return model

    few = ids()[:1, :8]
    plain, model = adapted(tiny_model()), with_fast_linears(adapted(tiny_model()))
    with torch.no_grad():
        assert relative(model(few).logits, plain(few).logits) < 1e-5
        assert len(calls) == PER_FORWARD
        with adapters_off(model):
            assert relative(model(few).logits, plain(few).logits) > 1e-2


def test_the_loss_in_chunks_still_sees_a_plain_head(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: list[Any] = []
    real = model_loss.chunked_cross_entropy
    monkeypatch.setattr(
        model_loss,
        "chunked_cross_entropy",
        lambda head, *args, **kwargs: heads.append(head) or real(head, *args, **kwargs),
    )
    model = with_chunked_loss(with_fast_linears(tiny_model())).train()
    loss, _ = loss_and_gradients(model, ids())
    torch.testing.assert_close(loss, loss_and_gradients(tiny_model().train(), ids())[0])
    assert heads == [None]


def test_where_it_is_not_known_to_be_faster_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_table, "measured", dict)
    model = with_fast_linears(tiny_model())
    assert "forward" not in model.lm_head.__dict__
    (row,) = explain(model).rows
    assert row.backend == "torch"
    assert "not measured to be faster" in dict(row.rejected)["native"]
    with pytest.raises(CompatibilityError, match="not measured to be faster"):
        with_fast_linears(tiny_model(), backend="native")
    with pytest.raises(BackendError, match="'fast'"):
        with_fast_linears(backend="fast")


def test_a_model_that_was_cast_is_served_or_left_alone(calls: list[tuple[int, ...]]) -> None:
    model, few = with_fast_linears(tiny_model()), ids()[:1, :8]
    model.set_experts_implementation("eager")
    with torch.no_grad():
        plain = tiny_model().double()
        plain.set_experts_implementation("eager")
        expected = plain(few).logits
        assert relative(model.double()(few).logits, expected) < 1e-6
        assert not calls
        assert relative(model.bfloat16()(few).logits.double(), expected) < 3e-2
        assert len(calls) == PER_FORWARD

"""`verify` says right where it is right, and finds broken kernels: each of the faults is planted in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gptoss_opt import (
    compose,
    undo,
    verify,
    with_chunked_loss,
    with_fast_experts,
    with_fast_linears,
    with_flash_attention,
    with_lora,
    with_mxfp4_experts,
)
from gptoss_opt.kernels.experts.impl.torch_grouped import TORCH_GROUPED
from gptoss_opt.kernels.kernel_table import kernel_for
from gptoss_opt.model import attention as attention_module
from gptoss_opt.model import experts as experts_module
from gptoss_opt.verification.drift import share_of
from tests.helpers import WINDOW, ids, tiny_model

STACKS = {
    "nothing": compose(),
    "attention": compose(with_flash_attention()),
    "packed": compose(with_flash_attention(), with_mxfp4_experts(), with_fast_linears()),
    "dense": compose(with_flash_attention(), with_fast_experts(), with_fast_linears()),
    "adapters": compose(with_flash_attention(), with_mxfp4_experts(), with_lora(rank=4), with_chunked_loss()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STACKS)
def test_what_is_right(name: str, dtype: torch.dtype) -> None:
    model = STACKS[name](tiny_model(dtype))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    model.train()
    found = verify(model, gradients=True)
    assert found.right, str(found)
    assert found.verdict.startswith("Right: ")
    assert {drift.kind for drift in found.drifts} == {"forward", "gradient", "decoding"}
    assert {drift.part for drift in found.drifts} == {"attention", "router", "experts", "head"}
    # Not by far too much: what is allowed is near to what rounding takes.
    assert max(drift.share for drift in found.drifts) > 0.05
    # Nothing is left behind.
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


Fault = Callable[[pytest.MonkeyPatch], None]


def of_attention(change: Callable[..., Any]) -> Fault:
    """Attention that is asked for something else."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        real = attention_module.attention

        def broken(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, **options: Any) -> Tensor:
            return real(q, k, v, **change(sinks, options))

        monkeypatch.setattr(attention_module, "attention", broken)

    return plant


def of_experts(change: Callable[..., Any]) -> Fault:
    """Experts that are asked for something else."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        real = experts_module.experts

        def broken(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Any, down: Any, **options: Any) -> Tensor:
            return real(x, *change(indices, weights, gate_up, down), **options)

        monkeypatch.setattr(experts_module, "experts", broken)

    return plant


def stale(weights: Any) -> Any:
    scales = weights.scales.clone()
    scales[0, 3, 0] += 1  # one block of 32 values
    return replace(weights, scales=scales)


def window_off_by_one(sinks: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    window = options["window"]
    return {**options, "sinks": sinks, "window": window if window is None else window - 1}


FAULTS: dict[str, tuple[Fault, str]] = {
    "sink dropped": (
        of_attention(lambda sinks, options: {**options, "sinks": torch.full_like(sinks, -1e4)}),
        "attention",
    ),
    "window off by one": (of_attention(window_off_by_one), "attention"),
    "bias twice": (
        of_experts(lambda i, w, gate_up, down: (i, w, gate_up, replace(down, bias=down.bias * 2))),
        "experts",
    ),
    "wrong expert order": (
        of_experts(lambda i, w, gate_up, down: (i.flip(-1), w, gate_up, down)),
        "experts",
    ),
    "stale scale": (of_experts(lambda i, w, gate_up, down: (i, w, stale(gate_up), down)), "experts"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, part = FAULTS[name]
    # Experts of the router's ties apart, all are hit: the fault is where tokens go.
    model = compose(with_flash_attention(), with_mxfp4_experts())(tiny_model(dtype, num_experts_per_tok=4))
    assert verify(model).right
    plant(monkeypatch)
    found = verify(model)
    assert not found.right
    assert {drift.part for drift in found.wrong if drift.part != "head"} == {part}
    assert found.verdict.startswith("WRONG: ")
    assert f"{part} by" in found.verdict
    assert "NO" in str(found.table)


def test_a_backend_that_is_not_chosen_is_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_fast_experts(tiny_model(torch.float32), backend="reference")
    assert verify(model).right
    real = TORCH_GROUPED.forward
    monkeypatch.setattr(type(TORCH_GROUPED), "forward", lambda self, *args: real(*args) * 1.001)
    found = verify(model)
    assert {(drift.part, drift.backend) for drift in found.wrong} == {("experts", "torch")}
    assert kernel_for("dense experts", torch.float32, 1) in ("native", "torch")


def test_gradients_are_compared_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_mxfp4_experts(tiny_model(torch.float32))
    backend = experts_module.kernel_of(
        experts_module.weights_held(model.model.layers[0].mlp.experts, "down_proj"), "reference"
    )
    real = type(backend).backward
    monkeypatch.setattr(type(backend), "backward", lambda self, *args: real(self, *args) * 1.01)
    assert verify(model).right
    found = verify(model, gradients=True)
    assert {(drift.kind, drift.backend) for drift in found.wrong} == {("gradient", "reference")}


def test_nan_is_wrong() -> None:
    exact = torch.ones(2, 3, dtype=torch.float64)
    assert share_of(torch.full((2, 3), torch.nan), exact.float(), exact, 1e-7) == (float("inf"), "not a number")


def test_tokens_of_your_own() -> None:
    model = with_flash_attention(tiny_model())
    found = verify(model, tokens=ids(1, 2 * WINDOW))
    assert found.right
    assert f"1 rows of {2 * WINDOW} tokens" in found.title
    undo(model)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"against": "a friend"}, "Use 'eager'"),
        ({"tokens": torch.randn(2, 20)}, "float32"),
        ({"tokens": torch.ones(2, 3, dtype=torch.long)}, "5 at least"),
        ({"tokens": torch.ones(8, 600, dtype=torch.long)}, "Give fewer"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        verify(tiny_model(), **options)


def test_it_is_shown() -> None:
    found = verify(tiny_model())
    assert "Right" in found._repr_html_()
    assert "attention" in repr(found)

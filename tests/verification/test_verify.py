"""`verify` says right where it is right, and finds broken kernels: each of the faults is planted in turn."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

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
from gptoss_opt.kernels.decoder_layer import NativeLayer
from gptoss_opt.kernels.experts.impl.torch_grouped import TORCH_GROUPED
from gptoss_opt.kernels.kernel_table import kernel_for
from gptoss_opt.model import attention as attention_module
from gptoss_opt.model import experts as experts_module
from gptoss_opt.model import linears as linears_module
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
    routing = {"router", "router's weights", "router's choice"}
    assert {drift.part for drift in found.drifts} == {
        "attention",
        "experts",
        "norm",
        "rotary embedding",
        "embedding",
        "head",
        *routing,
    }
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
        ({"tokens": [[1, 2, 3, 4, 5]]}, "tokens are list"),
        ({"tokens": torch.full((1, 6), 10**6)}, "of 128 words"),
        ({"tokens": torch.ones(0, 9, dtype=torch.long)}, "a row at least"),
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


# What lies between the parts.


def patched(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **options: change(real, *args, **options))


def worse_choice(real: Any, logits: Tensor, count: int) -> Any:
    return real(-logits, count)


BETWEEN = {
    "norm": (linears_module, "rms_norm", lambda real, *args, **options: real(*args, **options) * 1.05, "norm"),
    "choice": (linears_module, "most_probable", worse_choice, "router's choice"),
    "angles": (GptOssRotaryEmbedding, "forward", lambda real, self, x, p: real(self, x, 2 * p), "rotary embedding"),
    "whole layers": (NativeLayer, "after", lambda real, *args: real(*args) * 1.03, "head"),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_faults_between_the_parts_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, function, change, part = BETWEEN[name]
    model = STACKS["packed"](tiny_model(torch.bfloat16))
    if kernel_for("q_proj", torch.bfloat16, 1) == "torch" and name != "angles":
        pytest.skip("linear layers, norms and whole layers are not native on this processor")
    assert verify(model).right
    patched(monkeypatch, owner, function, change)
    found = verify(model)
    assert part in {drift.part for drift in found.wrong}, str(found)


# Models that are wrapped by others, or odd.


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_of_peft_are_part_of_the_weights() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(with_flash_attention(tiny_model()), config)
    assert verify(adapted).right
    adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].register_forward_hook(
        lambda *x: x[2] * 2
    )
    assert not verify(adapted).right
    assert verify(peft.get_peft_model(tiny_model(), config)).right
    with pytest.raises(ValueError, match="Merge them"):
        on_experts = peft.LoraConfig(r=4, target_modules=[], target_parameters=["mlp.experts.down_proj"])
        verify(peft.get_peft_model(tiny_model(), on_experts))


@pytest.mark.parametrize("options", [{"sliding_window": 700}, {"output_router_logits": True}])
def test_odd_configs(options: dict[str, Any]) -> None:
    assert verify(with_flash_attention(tiny_model(**options))).right


def test_float64_and_zeros() -> None:
    assert verify(compose(with_flash_attention(), with_fast_experts())(tiny_model(torch.float64)), gradients=True).right
    model = with_flash_attention(tiny_model(torch.bfloat16))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = verify(model)
    assert found.right
    model.lm_head.weight.data.fill_(torch.nan)
    found = verify(model)
    assert not found.right
    json.loads(json.dumps(found.to_dict(), allow_nan=False))


def test_whatever_is_switched_off_around_it() -> None:
    model = with_flash_attention(tiny_model())
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            assert verify(model, gradients=not isinstance(context, torch.autocast)).right


def test_hooks_of_the_user_are_not_what_is_verified() -> None:
    model = with_flash_attention(tiny_model())
    model.model.layers[0].self_attn.register_forward_hook(lambda module, args, out: (out[0] + 1, out[1]))
    assert not [drift for drift in verify(model).wrong if drift.kind == "decoding" or drift.backend == "native"]


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match="GptOssForCausalLM"):
        verify(tiny_model().model)

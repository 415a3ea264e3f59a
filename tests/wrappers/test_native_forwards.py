"""Where native code computes a layer's forward: only that of its class, outside of training, not under a tracer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.models.gpt_oss import modeling_gpt_oss

from gptoss_opt import with_fast_linears, with_flash_attention
from gptoss_opt.kernels import kernel_table, native
from gptoss_opt.model import attention, linears
from tests.helpers import few_rows_native, ids, relative, tiny_model

if native.why_not("cpu", torch.float32):
    pytest.skip("no native library here", allow_module_level=True)

FEW = ids()[:1, :4]
LAYERS = {
    "norm": "model.norm",
    "router": "model.layers.0.mlp.router",
    "linear": "model.layers.0.self_attn.q_proj",
    "attention": "model.layers.0.self_attn",
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was computed natively."""
    found: list[str] = []
    monkeypatch.setattr(kernel_table, "measured", few_rows_native)
    for module, name in ((linears, "product"), (linears, "rms_norm"), (attention, "rotate")):
        real: Callable[..., Any] = getattr(module, name)

        def counted(*args: Any, real: Callable[..., Any] = real, name: str = name) -> Any:
            found.append(name)
            return real(*args)

        monkeypatch.setattr(module, name, counted)
    return found


def wrapped(model: Any) -> Any:
    return with_fast_linears(with_flash_attention(model))


def test_all_of_them_are_used(calls: list[str]) -> None:
    with torch.no_grad():
        assert relative(wrapped(tiny_model())(FEW).logits, tiny_model()(FEW).logits) < 1e-5
    assert {name: calls.count(name) for name in calls} == {"rms_norm": 7, "product": 16, "rotate": 6}


def test_training_is_transformers_own(calls: list[str]) -> None:
    model = wrapped(tiny_model()).train()
    with torch.no_grad():
        model(FEW)
    assert not calls


@pytest.mark.parametrize("path", LAYERS.values(), ids=LAYERS)
def test_a_forward_of_the_users_stays(path: str, calls: list[str]) -> None:
    model = tiny_model()
    module, seen = model.get_submodule(path), []
    real = module.forward
    module.forward = lambda *args, **kwargs: seen.append(path) or real(*args, **kwargs)
    with torch.no_grad():
        wrapped(model)(FEW)
    assert seen == [path]


@pytest.mark.parametrize("path", LAYERS.values(), ids=LAYERS)
def test_a_forward_that_is_put_into_the_class_later_is_called(
    path: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrapped(tiny_model())
    kind, seen = type(model.get_submodule(path)), []
    real = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: seen.append(1) or real(self, *args, **kwargs))
    with torch.no_grad():
        model(FEW)
    assert len(seen) == sum(type(module) is kind for module in model.modules())


def test_what_is_put_into_transformers_later_is_called(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = wrapped(tiny_model()), []
    real = modeling_gpt_oss.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_gpt_oss, "apply_rotary_pos_emb", lambda *args: seen.append(1) or real(*args))
    with torch.no_grad():
        model(FEW)
    assert len(seen) == 3
    assert "rotate" not in calls


@pytest.mark.parametrize("trace", [make_fx, lambda f: lambda x: torch.jit.trace(f, x, check_trace=False)])
@pytest.mark.parametrize("path", ["model.norm", "model.layers.0.self_attn.q_proj"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracers_see_torchs_operations(path: str, trace: Any, calls: list[str]) -> None:
    module = wrapped(tiny_model().requires_grad_(False)).get_submodule(path)
    one, other = torch.randn(2, 2, module.weight.shape[-1])
    with torch.no_grad():
        traced = trace(lambda x: module(x))(one)
        assert not calls
        assert relative(traced(other), module(other)) < 1e-5
        assert calls


@pytest.mark.parametrize("trace", [make_fx, lambda f: lambda *x: torch.jit.trace(f, x, check_trace=False)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracers_see_attention(trace: Any) -> None:
    function = lambda q, k: attention.attention(q, k, k, torch.zeros(4), scale=0.3, backend="native")  # noqa: E731
    (q, q2), (k, k2) = torch.randn(2, 2, 4, 1, 16), torch.randn(2, 2, 2, 7, 16)
    with torch.no_grad():
        assert relative(trace(function)(q, k)(q2, k2), function(q2, k2)) < 1e-5
        per_row = torch.func.vmap(function)(torch.stack([q, q2]), torch.stack([k, k2]))
        assert relative(per_row[1], function(q2, k2)) < 1e-5
        negated = torch._neg_view(q)
        assert relative(function(negated, k), function(-q, k)) < 1e-5


def test_another_default_device_is_not_written_to(calls: list[str]) -> None:
    model = wrapped(tiny_model())
    hidden, angles = torch.randn(1, 1, 64), torch.randn(2, 1, 1, 8)
    layer = model.model.layers[0].self_attn
    with torch.no_grad():
        expected = layer(hidden, tuple(angles), None)[0]
        with torch.device("meta"):
            found = layer(hidden, tuple(angles), None)[0]
    assert torch.equal(found, expected)
    assert calls.count("rotate") == 4

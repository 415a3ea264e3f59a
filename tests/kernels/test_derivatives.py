"""Derivatives beyond the first backward: right, or refused with the backend that has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gptoss_opt import with_fast_experts, with_flash_attention, with_mxfp4_experts
from tests.helpers import ids, relative, tiny_model

# Those of torch itself, under vmap and in forward mode.
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
]

WRAP: dict[str, Callable[..., Any]] = {
    "flash": with_flash_attention,
    "fast": with_fast_experts,
    "packed": with_mxfp4_experts,
}
EACH = pytest.mark.parametrize("wrap", WRAP.values(), ids=WRAP)


def made(wrap: Callable[..., Any] | None = None, **options: Any) -> Any:
    model = tiny_model(num_hidden_layers=1)
    return model if wrap is None else wrap(model, **options)


def loss_of(model: Any) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    codes = {name: p.detach() for name, p in model.named_parameters() if not p.is_floating_point()}
    options = {"use_cache": False}
    return lambda weights, x: (
        torch.func.functional_call(model, {**codes, **weights}, (x,), {"labels": x, **options}).loss
    )


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.is_floating_point()}


def per_example(model: Any) -> Tensor:
    grad = torch.func.vmap(torch.func.grad(loss_of(model)), in_dims=(None, 0), randomness="different")
    return grad(weights_of(model), ids(3, 6)[:, None])["model.norm.weight"]


def forward_mode(model: Any) -> Tensor:
    primal, tangent = torch.linspace(-1, 1, 2 * 6 * 64).view(2, 1, 6, 64)
    run = lambda x: model(inputs_embeds=x, use_cache=False).logits  # noqa: E731
    return torch.func.jvp(run, (primal,), (tangent,))[1]


def second(model: Any) -> Tensor:
    weights = [model.model.embed_tokens.weight, model.lm_head.weight, model.model.layers[0].mlp.experts.down_proj_bias]
    loss = model(ids(1, 6), labels=ids(1, 6), use_cache=False).loss
    first = torch.autograd.grad(loss, weights, create_graph=True)
    found = torch.autograd.grad(sum(g.square().sum() for g in first), weights)
    return torch.cat([g.flatten() for g in found])


def third(model: Any) -> Tensor:
    weight = model.model.layers[0].mlp.experts.gate_up_proj_bias
    found = model(ids(1, 6), labels=ids(1, 6), use_cache=False).loss
    for _ in range(2):
        (found,) = torch.autograd.grad(found.square().sum(), weight, create_graph=True)
    return torch.autograd.grad(found.square().sum(), weight)[0]


def batched(model: Any) -> Tensor:
    outputs = model(ids(1, 6), use_cache=False).logits[0, -1, :4]
    return torch.autograd.grad(outputs, model.model.embed_tokens.weight, torch.eye(4), is_grads_batched=True)[0]


@EACH
def test_the_reference_has_the_transforms_of_torch_func(wrap: Callable[..., Any]) -> None:
    expected = per_example(made())
    assert relative(expected[0], expected[1]) > 1e-2
    assert relative(per_example(made(wrap, backend="reference")), expected) < 1e-5
    with pytest.raises(ValueError, match=r"has no rule for torch.func.grad.*only backend='reference'"):
        per_example(made(wrap))


def test_forward_mode() -> None:
    both = with_flash_attention(made(with_fast_experts, backend="reference"), backend="reference")
    primal, tangent = torch.linspace(-1, 1, 2 * 6 * 64).view(2, 1, 6, 64)
    step, plain = 1e-3, made()
    ahead, behind = (plain(inputs_embeds=primal + sign * step * tangent).logits for sign in (1, -1))
    assert relative(forward_mode(both), (ahead - behind) / (2 * step)) < 1e-2
    for wrap in WRAP.values():
        with pytest.raises(ValueError, match=r"has no rule for forward-mode derivatives.*only backend='reference'"):
            forward_mode(made(wrap))


@EACH
def test_second_derivatives(wrap: Callable[..., Any]) -> None:
    expected = second(made())
    assert relative(second(made(wrap, backend="reference")), expected) < 1e-4
    if wrap is with_flash_attention:
        with pytest.raises(ValueError, match=r"no second derivative: only backend='reference'"):
            second(made(wrap))
    else:
        assert relative(second(made(wrap)), expected) < 1e-4


@pytest.mark.parametrize("wrap", [with_fast_experts, with_mxfp4_experts])
def test_third_derivatives(wrap: Callable[..., Any]) -> None:
    assert relative(third(made(wrap)), third(made())) < 1e-3


def test_second_derivatives_of_dense_weights() -> None:
    def run(model: Any) -> Tensor:
        experts = model.model.layers[0].mlp.experts
        loss = model(ids(1, 6), labels=ids(1, 6), use_cache=False).loss
        first = torch.autograd.grad(loss, [experts.down_proj, experts.gate_up_proj], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), experts.gate_up_proj)[0]

    assert relative(run(made(with_fast_experts)), run(made())) < 1e-4


@EACH
def test_batched_gradients(wrap: Callable[..., Any]) -> None:
    assert relative(batched(made(wrap)), batched(made())) < 1e-5

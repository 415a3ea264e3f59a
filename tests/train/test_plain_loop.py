"""Adapters in a training loop of one's own, beside the same in plain PyTorch, where every weight is W + scale B A."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import accelerate
import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.func import functional_call

from gptoss_opt import compose, with_fast_experts, with_flash_attention, with_mxfp4_experts
from gptoss_opt.model import gradients as calls
from gptoss_opt.wrappers.lora import TARGETS
from tests.helpers import gradients, ids, loss_and_gradients, relative, tiny_model
from tests.train.twins import adapted, assert_only_adapters_changed, plain, values

STEPS = 6


class Merged(nn.Module):
    """A plain model that computes with W + scale B A, for each pair of adapters."""

    def __init__(self, base: nn.Module, adapters: dict[str, Tensor], scale: float) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        self.names = list(adapters)
        self.factors = nn.ParameterList(adapters.values())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        factors = dict(zip(self.names, self.factors, strict=True))
        weights = {}
        for name, a in factors.items():
            if name.endswith("lora_A"):
                delta = self.scale * factors[f"{name[:-1]}B"] @ a
                of_experts = name.endswith("_proj_lora_A")
                key = name.removesuffix("_lora_A") if of_experts else name.replace("lora_A", "weight")
                weights[key] = self.base.get_parameter(key) + (delta.mT if of_experts else delta)
        return functional_call(self.base, weights, args, kwargs)


def merged(model: nn.Module, scale: float = 4.0) -> Merged:
    return Merged(plain(), {name: value for name, value in values(model).items() if "lora_" in name}, scale)


def batch(step: int) -> Tensor:
    return ids(batch=4, length=12, seed=step % 2)


def curve(model: nn.Module, prepare: Any = None) -> list[tuple[float, float]]:
    """The losses, and the norms of the gradients, of a short training."""
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer: Any = torch.optim.AdamW(trained, lr=1e-2)
    backward: Callable[[Tensor], Any] = Tensor.backward
    if prepare:
        model, optimizer = prepare.prepare(model, optimizer)
        backward = prepare.backward
    found = []
    for step in range(STEPS):
        loss = model(batch(step), labels=batch(step)).loss
        backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), float(norm)))
    return found


STACKS = {
    "adapters": compose(),
    "attention": compose(with_flash_attention()),
    "grouped experts": compose(with_fast_experts()),
    "packed experts": compose(with_mxfp4_experts(), with_flash_attention()),
}


@pytest.mark.parametrize("stack", STACKS)
def test_the_curve_is_that_of_plain_pytorch(stack: str) -> None:
    model = STACKS[stack](adapted())
    before = values(model)
    expected = curve(merged(adapted()))
    found = curve(model)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert found[-1][0] < 0.6 * found[0][0]
    assert_only_adapters_changed(model, before)
    # Negative control: adapters that count for less.
    assert abs(curve(merged(adapted(), scale=3.9))[-1][0] / expected[-1][0] - 1) > 1e-3


def test_accelerate_prepares_it() -> None:
    found = curve(adapted(), accelerate.Accelerator(cpu=True))
    torch.testing.assert_close(found, curve(merged(adapted())), rtol=1e-9, atol=0)


# Checkpointed layers


def checkpoint_layers(model: Any, **options: Any) -> Any:
    new = Version(version("transformers")) >= Version("5.23")
    (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)(options or None)
    return model.train()


def with_dropout() -> Any:
    return adapted(dropout=0.3).train()


@pytest.mark.parametrize("options", [{}, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
def test_checkpointed_layers_give_the_same_gradients(options: dict[str, bool]) -> None:
    model = with_dropout()
    torch.manual_seed(3)
    loss, expected = loss_and_gradients(model, ids())
    for name in ("input_ids", "inputs_embeds"):
        model = checkpoint_layers(with_dropout(), **options)
        inputs = ids() if name == "input_ids" else model.get_input_embeddings()(ids()).detach()
        torch.manual_seed(3)
        found_loss = model(**{name: inputs}, labels=ids()).loss
        found_loss.backward()
        assert found_loss == loss
        assert not inputs.requires_grad
        found = gradients(model)
        assert found.keys() == expected.keys() == {name for name in values(model) if "lora_" in name}
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    # Negative control: other inputs are left out next time, and the gradients are others.
    _, other = loss_and_gradients(model, ids())
    assert min(relative(other[name], expected[name]) for name in expected) > 1e-3


def test_negative_control_a_reentrant_layer_whose_input_takes_no_gradient_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calls, "take_gradients", lambda *_: None)
    model = checkpoint_layers(adapted(targets=("q_proj", "lm_head")), use_reentrant=True)
    embeds = model.get_input_embeddings()(ids()).detach()
    with pytest.warns(UserWarning, match="Gradients will be None"):
        model(inputs_embeds=embeds, labels=ids()).loss.backward()
    assert list(gradients(model)) == ["lm_head.lora_A", "lm_head.lora_B"]


def test_the_routers_loss_behind_reentrant_checkpoints_is_refused() -> None:
    model = checkpoint_layers(adapted(targets=("router",)), use_reentrant=True)
    said = "reentrant checkpoints cut off the gradient of the router's loss. Set use_reentrant=False"
    with pytest.raises(ValueError, match=said):
        model(ids(), labels=ids(), output_router_logits=True)
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match=said):
        model(ids(), labels=ids())
    loss_and_gradients(model, ids(), output_router_logits=False)
    checkpoint_layers(model, use_reentrant=False)
    _, found = loss_and_gradients(model, ids())
    whole = adapted(targets=("router",)).train()
    whole.config.output_router_logits = True
    _, expected = loss_and_gradients(whole, ids())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# torch.compile


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("dtype", "packed"), [(torch.bfloat16, False), (torch.float32, True)], ids=["dense bfloat16", "packed float32"]
)
def test_a_compiled_step_is_the_step(dtype: torch.dtype, packed: bool) -> None:
    def make(dtype: torch.dtype) -> Any:
        model = tiny_model(dtype, num_hidden_layers=1)
        options = {"targets": (*TARGETS, "router"), "dtype": torch.promote_types(dtype, torch.float32)}
        model = adapted(model, **options).train()
        return with_mxfp4_experts(model) if packed else model

    _, truth = loss_and_gradients(make(torch.float64), ids())
    model = make(dtype)
    loss, expected = loss_and_gradients(model, ids())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found_loss, found = loss_and_gradients(compiled, ids())
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found_loss, loss, rtol=rtol, atol=0)
    found = {name.removeprefix("_orig_mod."): gradient for name, gradient in found.items()}
    assert found.keys() == expected.keys()
    errors, allowed = (max(relative(one[name], truth[name]) for name in truth) for one in (found, expected))
    assert errors < 2 * allowed
    # And the optimizer's steps reach it.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(3):
        compiled(ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = compiled(ids(), labels=ids()).loss
    assert after < 0.9 * loss
    torch.testing.assert_close(after, model(ids(), labels=ids()).loss, rtol=rtol, atol=0)

"""Training of all parameters: gradients, checkpoints, flags, the router's loss, memory, and transformers' Trainer."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GptOssForCausalLM,
    GptOssForSequenceClassification,
    GptOssModel,
    Trainer,
    TrainingArguments,
)

from gptoss_opt import (
    CompatibilityError,
    compose,
    explain,
    load,
    stack_of,
    undo,
    with_fast_experts,
    with_flash_attention,
    with_full_finetuning,
    with_mxfp4_experts,
)
from gptoss_opt.model import training
from gptoss_opt.model.training_memory import OPTIMIZERS
from tests.helpers import GOLDEN, WINDOW, gradients, ids, loss_and_gradients, relative, tiny_config, tiny_model
from tests.stacks.low_rank import LowRank

CHECKPOINTING = (
    "activation_checkpointing" if Version(version("transformers")) >= Version("5.23") else "gradient_checkpointing"
)
"""What transformers calls it."""


def padded() -> Tensor:
    """A mask with more padding on the left of one row than the window is wide."""
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, : WINDOW + 2] = 0
    return mask


def exact(**changes: Any) -> Any:
    """In float64, in which no curve parts from another by rounding, and transformers computes experts one by one."""
    model = tiny_model(torch.float64, **changes)
    model.set_experts_implementation("eager")
    return model


def trained_curve(model: Any, steps: int = 5, **kwargs: Any) -> list[float]:
    """The losses of a short training with AdamW."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        loss = model(ids(seed=step % 2), labels=ids(seed=step % 2), **kwargs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Count the bytes of all tensors that are kept for a backward pass, but for parameters."""
    counts: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            counts.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield counts


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


# Gradients


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("mask", [None, padded()], ids=["whole", "padded"])
def test_every_parameter_has_the_gradient_of_plain_transformers(checkpointing: bool, mask: Tensor | None) -> None:
    loss, expected = loss_and_gradients(tiny_model().train(), ids(), attention_mask=mask)
    model = with_full_finetuning(tiny_model().requires_grad_(False), gradient_checkpointing=checkpointing).train()
    found_loss, found = loss_and_gradients(model, ids(), attention_mask=mask)
    torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=0)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    assert max(relative(found[name], expected[name]) for name in expected) < 1e-5
    # Negative control: other tokens have other gradients, in every parameter.
    _, other = loss_and_gradients(model, ids(seed=2), attention_mask=mask)
    assert min(relative(other[name], expected[name]) for name in expected) > 1e-3


def test_a_short_training_is_that_of_plain_pytorch() -> None:
    expected = trained_curve(exact())
    torch.testing.assert_close(trained_curve(with_full_finetuning(exact())), expected, rtol=1e-9, atol=0)
    assert expected[-1] < expected[0] / 2
    # Negative control: one parameter that is not trained.
    frozen = with_full_finetuning(exact())
    frozen.lm_head.weight.requires_grad_(False)
    assert abs(trained_curve(frozen)[-1] / expected[-1] - 1) > 1e-3


def test_in_bfloat16_it_is_as_exact_as_plain_transformers() -> None:
    plain = tiny_model(torch.bfloat16).train()
    truth = exact().train()
    truth.load_state_dict({name: value.double() for name, value in plain.state_dict().items()})
    _, base = loss_and_gradients(plain, ids())
    _, found = loss_and_gradients(with_full_finetuning(tiny_model(torch.bfloat16)).train(), ids())
    _, expected = loss_and_gradients(truth, ids())
    worst, allowed = (max(relative(got[name], expected[name]) for name in expected) for got in (found, base))
    assert worst < 2 * allowed


@pytest.mark.parametrize("other", [with_flash_attention, with_fast_experts, LowRank])
def test_beside_other_wrappers_in_any_order(other: Callable[..., Any]) -> None:
    _, expected = loss_and_gradients(exact().train(), ids())
    for wrappers in itertools.permutations((other(), with_full_finetuning())):
        model = exact().requires_grad_(False)
        for wrapper in wrappers:
            wrapper(model)
        assert len(stack_of(model)) == 2
        _, found = loss_and_gradients(model.train(), ids())
        assert max(relative(found[name], expected[name]) for name in expected) < 1e-9


def test_what_others_bring_is_theirs() -> None:
    model = with_full_finetuning(LowRank()(tiny_model()))
    brought = [name for name in flags(model) if "low_" in name]
    assert brought
    assert all(flags(model).values())
    for name in brought:
        model.get_parameter(name).requires_grad_(False)
    again = with_full_finetuning(undo(model, with_full_finetuning))
    assert [name for name, trained in flags(again).items() if not trained] == brought


# Checkpoints


def peak(model: Any, length: int = 200) -> int:
    with saved_bytes() as counts:
        model(ids(1, length), labels=ids(1, length))
    return sum(counts)


def test_checkpointed_layers_keep_their_inputs_alone() -> None:
    short, long = (
        {
            checkpointing: peak(
                with_full_finetuning(tiny_model(num_hidden_layers=layers), gradient_checkpointing=checkpointing).train()
            )
            for checkpointing in (True, False)
        }
        for layers in (2, 6)
    )
    # Four layers more: their inputs [1, 200, 64] in float32 each, and what else they keep without checkpoints.
    assert long[True] - short[True] == 4 * 200 * 64 * 4
    assert long[False] - short[False] > 20 * (long[True] - short[True])


def test_layers_are_checkpointed_in_training_mode_alone() -> None:
    model = with_full_finetuning(tiny_model())
    plain = with_full_finetuning(tiny_model(), gradient_checkpointing=False)
    assert peak(model.train()) < peak(plain.train()) / 3
    assert peak(model.eval()) == peak(plain.eval())
    assert model(ids()).past_key_values is not None
    assert model.train()(ids()).past_key_values is None
    with torch.no_grad():
        assert relative(model.train()(ids()).logits, model.eval()(ids()).logits) == 0


def test_generates_in_training_mode_too() -> None:
    options = {"attention_mask": padded(), "max_new_tokens": 2 * WINDOW, "do_sample": False}
    expected = tiny_model().generate(ids(), **options)
    model = with_full_finetuning(tiny_model()).train()
    assert torch.equal(model.generate(ids(), **options), expected)
    # Negative control: transformers' own checkpoints alone let the layers forget the cache.
    model = tiny_model()
    getattr(model, f"{CHECKPOINTING}_enable")()
    assert not torch.equal(model.train().generate(ids(), **options), expected)


def test_training_on_top_of_a_cache_is_refused() -> None:
    model = with_full_finetuning(tiny_model())
    cache = model(ids()).past_key_values
    with pytest.raises(ValueError, match="cannot train on top of a cache: .* Leave past_key_values out"):
        model.train()(ids(), past_key_values=cache)
    undo(model)
    with_full_finetuning(model, gradient_checkpointing=False)
    model.train()(ids(), past_key_values=cache, labels=ids()).loss.backward()


def test_the_users_own_checkpoints_stay_or_come_back() -> None:
    def own(*args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(*args, use_reentrant=False)

    model = tiny_model()
    for module in (model.model, *model.model.layers):
        module.gradient_checkpointing, module._gradient_checkpointing_func = True, own
    with_full_finetuning(model, gradient_checkpointing=False)
    assert model.model.layers[0]._gradient_checkpointing_func is own
    undo(model)
    with_full_finetuning(model)
    assert model.model.layers[0]._gradient_checkpointing_func is training.checkpointed
    undo(model)
    assert model.model.layers[0]._gradient_checkpointing_func is own
    assert model.model.layers[0].gradient_checkpointing


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_compiles_in_training_mode() -> None:
    model = with_full_finetuning(tiny_model()).train()
    loss, expected = loss_and_gradients(model, ids())
    torch._dynamo.reset()
    found = torch.compile(model, backend="aot_eager")(ids(), labels=ids()).loss
    torch.testing.assert_close(found.detach(), loss, rtol=1e-5, atol=0)
    found.backward()
    got = gradients(model)
    assert max(relative(got[name], expected[name]) for name in expected) < 1e-4


# Flags


def test_undo_gives_every_flag_back() -> None:
    model = tiny_model()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 == 0)
    before = flags(model)
    state = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with_full_finetuning(model, router_aux_loss=0.1)
    assert all(flags(model).values())
    assert f"{sum(not on for on in before.values())} of which were frozen before" in explain(model).rows[0].changed[0]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(flags(twin).values())
        assert flags(undo(twin)) == before
        assert not twin.config.output_router_logits
        assert not twin.model.layers[0].gradient_checkpointing
    assert flags(undo(model)) == before
    for name, module in model.named_modules():
        assert module.__dict__.keys() == state[name].keys()
        assert all(module.__dict__[key] is value for key, value in state[name].items()), name


def test_what_the_user_freezes_afterwards_stays_frozen() -> None:
    model = with_full_finetuning(tiny_model())
    model.lm_head.weight.requires_grad_(False)
    assert "changed by you since" in explain(model).rows[0].changed[-1]
    with_full_finetuning(model)
    assert model.lm_head.weight.requires_grad
    model.lm_head.weight.requires_grad_(False)
    assert not undo(model).lm_head.weight.requires_grad


# The router's loss


def with_flags(weight: float, **changes: Any) -> Any:
    """Plain transformers with the same flags."""
    return tiny_model(output_router_logits=True, router_aux_loss_coef=weight, **changes)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("mask", [None, padded()], ids=["whole", "padded"])
def test_the_routers_loss_is_that_of_plain_transformers(checkpointing: bool, mask: Tensor | None) -> None:
    plain = with_flags(0.5).train()
    expected = plain(ids(), labels=ids(), attention_mask=mask)
    _, wanted = loss_and_gradients(plain, ids(), attention_mask=mask)
    model = with_full_finetuning(tiny_model(), router_aux_loss=0.5, gradient_checkpointing=checkpointing).train()
    found = model(ids(), labels=ids(), attention_mask=mask)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss, rtol=1e-5, atol=0)
    alone = tiny_model()(ids(), labels=ids(), attention_mask=mask).loss
    torch.testing.assert_close(found.loss, alone + 0.5 * expected.aux_loss, rtol=1e-5, atol=0)
    _, got = loss_and_gradients(model, ids(), attention_mask=mask)
    assert max(relative(got[name], wanted[name]) for name in wanted) < 1e-5
    # Negative control: without it the routers have other gradients.
    _, without = loss_and_gradients(with_full_finetuning(tiny_model()).train(), ids(), attention_mask=mask)
    assert min(relative(without[name], wanted[name]) for name in wanted if "router" in name) > 1e-3


def test_the_routers_loss_is_on_this_models_config_alone() -> None:
    plain = tiny_model()
    model = type(plain)(plain.config)
    before = plain.config.to_dict()
    with_full_finetuning(model, router_aux_loss=0.25)
    assert (model.config.output_router_logits, model.config.router_aux_loss_coef) == (True, 0.25)
    assert model.router_aux_loss_coef == 0.25
    assert plain.config.to_dict() == before
    assert undo(model).config is plain.config
    assert model.router_aux_loss_coef == before["router_aux_loss_coef"]
    assert with_full_finetuning(model).config.to_dict() == before


def test_the_routers_loss_is_where_there_are_labels() -> None:
    model = with_full_finetuning(tiny_model(), router_aux_loss=0.5)
    expected = with_flags(0.5)(ids(), labels=ids(), attention_mask=padded())
    torch.testing.assert_close(model(ids(), labels=ids(), attention_mask=padded()).loss, expected.loss)
    torch.testing.assert_close(model(ids(), padded(), labels=ids()).loss, expected.loss)
    assert model(ids(), attention_mask=padded()).get("aux_loss") is None
    asked = model(ids(), attention_mask=padded(), output_router_logits=True)
    torch.testing.assert_close(asked.aux_loss, expected.aux_loss)
    assert model(ids(), labels=ids(), output_router_logits=False).get("aux_loss") is None
    assert model.train()(ids()).aux_loss is not None
    model.config.output_router_logits = False
    assert model(ids(), labels=ids()).get("aux_loss") is None


def test_it_generates_with_the_routers_loss() -> None:
    options = {"attention_mask": padded(), "max_new_tokens": WINDOW, "do_sample": False}
    expected = tiny_model().generate(ids(), **options)
    model = with_full_finetuning(tiny_model(), router_aux_loss=0.5)
    assert torch.equal(model.generate(ids(), **options), expected)
    assert torch.equal(model.train().generate(ids(), **options), expected)
    assert torch.equal(model.generate(ids(), cache_implementation="static", **options), expected)
    # transformers counts the tokens of one step by the mask of all.
    with pytest.raises(RuntimeError, match="must match the size"):
        with_flags(0.5).generate(ids(), **options)


def test_the_checkpoint_says_nothing_of_the_routers_loss(tmp_path: Path) -> None:
    model = with_full_finetuning(tiny_model(), router_aux_loss=0.5)
    model.save_pretrained(tmp_path / "wrapped")
    tiny_model().save_pretrained(tmp_path / "plain")
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("wrapped", "plain")]
    assert configs[0] == configs[1]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "wrapped").eval()
    assert torch.equal(
        plain.generate(ids(), max_new_tokens=3, do_sample=False),
        model.generate(ids(), max_new_tokens=3, do_sample=False),
    )
    # What the user sets is the user's.
    model.config.router_aux_loss_coef = 0.75
    model.save_pretrained(tmp_path / "wrapped")
    assert json.loads((tmp_path / "wrapped" / "config.json").read_text())["router_aux_loss_coef"] == 0.75


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(2, 1, 21, 21, dtype=torch.bool).tril(), r"this one is \[2, 1, 21, 21\]. Give such a mask"),
        ({"full_attention": None, "sliding_attention": None}, "this one is a dict. Give such a mask"),
        (padded() + padded().cumsum(-1).gt(6), "this one numbers packed sequences. Give position_ids that restart"),
    ],
    ids=["own", "by layer", "numbered"],
)
def test_masks_that_count_no_tokens_are_refused(mask: Any, said: str) -> None:
    model = with_flash_attention(with_full_finetuning(tiny_model(), router_aux_loss=0.5)).train()
    with pytest.raises(ValueError, match=rf"counts tokens by an attention_mask \[batch, len\].*{said}"):
        model(ids(), labels=ids(), attention_mask=mask)
    model(ids(), labels=ids(), attention_mask=mask, output_router_logits=False).loss.backward()
    assert model(ids(), attention_mask=mask).get("aux_loss") is None


def test_packed_sequences_count_all_their_tokens() -> None:
    position_ids = torch.tensor([[*range(9), *range(12)]] * 2)
    model = with_flash_attention(with_full_finetuning(tiny_model(), router_aux_loss=0.5)).train()
    found = model(ids(), labels=ids(), position_ids=position_ids)
    alone = [
        model(ids()[:, part], output_router_logits=True, labels=ids()[:, part]) for part in (slice(9), slice(9, 21))
    ]
    # Each layer's tokens, of both sequences: [layers, tokens, experts].
    logits = torch.cat([torch.stack(one.router_logits).unflatten(1, (2, -1)) for one in alone], 2).flatten(1, 2)
    probabilities = logits.softmax(-1).flatten(0, 1)
    chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(2).indices, 1.0)
    torch.testing.assert_close(found.aux_loss, 4 * (chosen.mean(0) * probabilities.mean(0)).sum(), rtol=1e-5, atol=0)


# Memory


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw", torch.optim.AdamW),
        ("adafactor", torch.optim.Adafactor),
        ("sgd_momentum", lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)),
        ("sgd", lambda parameters: torch.optim.SGD(parameters, lr=0.1)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_that_explain_names_is_what_an_optimizer_takes(name: str, make: Any, dtype: torch.dtype) -> None:
    model = with_full_finetuning(tiny_model(dtype), optimizer_state=name)
    optimizer = make(model.parameters())
    model(ids(), labels=ids()).loss.backward()
    optimizer.step()
    state = sum(
        value.nbytes
        for kept in optimizer.state.values()
        for key, value in kept.items()
        if isinstance(value, Tensor) and key != "step"
    )
    assert sum(OPTIMIZERS[name].num_bytes(parameter) for parameter in model.parameters()) == state
    taken = sum(parameter.grad.nbytes for parameter in model.parameters())
    row = " ".join(explain(model).rows[0].changed)
    named = re.search(
        r"gradients ([\d.]+) MB, optimizer state ([\d.]+) MB \((.*?)\): ([\d.]+) MB with the weights", row
    )
    assert named
    assert float(named[1]) == pytest.approx(taken / 1e6, abs=0.006)
    assert float(named[2]) == pytest.approx(state / 1e6, abs=0.006)
    assert float(named[4]) == pytest.approx((2 * taken + state) / 1e6, abs=0.006)
    assert (str(dtype).removeprefix("torch.") in named[3]) == (state > 0)
    assert "rank" not in row


def test_the_memory_of_eight_bits() -> None:
    # bitsandbytes and torchao: two bytes, and two float32 scales for each block of 256.
    assert OPTIMIZERS["adamw_8bit"].num_bytes(torch.empty(4, 4096)) == 2 * (4 * 4096 + 4 * 4 * 4096 / 256)
    row = " ".join(explain(with_full_finetuning(tiny_model(), optimizer_state="adamw_8bit")).rows[0].changed)
    assert "(AdamW, 2 x 8 bits)" in row


def test_the_memory_of_the_released_sizes_is_in_gigabytes() -> None:
    with torch.device("meta"):
        config = tiny_config(hidden_size=2880, intermediate_size=2880, num_local_experts=32)
        large = GptOssForCausalLM(config).bfloat16()
    text = " ".join(explain(with_full_finetuning(large)).rows[0].changed)
    weights = sum(parameter.nbytes for parameter in large.parameters())
    assert f"gradients {weights / 1e9:.2f} GB, optimizer state {2 * weights / 1e9:.2f} GB" in text
    assert f"{4 * weights / 1e9:.2f} GB with the weights" in text


# Refusals


def test_packed_experts_are_refused_with_what_to_do() -> None:
    said = re.escape(
        "with_full_finetuning() refuses packed experts, set by with_mxfp4_experts(): packed weights take no gradient. "
        "undo(model, with_mxfp4_experts), or use with_lora() instead."
    )
    with pytest.raises(CompatibilityError, match=said):
        compose(with_full_finetuning(), with_mxfp4_experts())
    model = with_mxfp4_experts(tiny_model())
    with pytest.raises(CompatibilityError, match=said):
        with_full_finetuning(model)
    assert len(stack_of(model)) == 1
    with_full_finetuning(undo(model, with_mxfp4_experts))
    with pytest.raises(CompatibilityError, match=said):
        with_mxfp4_experts(model)
    assert model.model.layers[0].mlp.experts.down_proj.requires_grad


def test_what_cannot_be_trained_is_refused() -> None:
    model = tiny_model()
    model.is_quantized = True
    with pytest.raises(CompatibilityError, match="transformers has quantised this model, .* Load it dense"):
        with_full_finetuning(model)
    offloaded = accelerate.cpu_offload(tiny_model(), execution_device="cpu")
    with pytest.raises(CompatibilityError, match="accelerate has offloaded weights .* Load it without offloading"):
        with_full_finetuning(offloaded)


def test_a_checkpoint_that_transformers_dequantised_is_trained() -> None:
    model = with_full_finetuning(AutoModelForCausalLM.from_pretrained(GOLDEN, dtype=torch.float32).float()).train()
    loss, found = loss_and_gradients(model, ids())
    loaded = load(GOLDEN, with_full_finetuning(), dtype=torch.float32).train()
    other_loss, other = loss_and_gradients(loaded, ids())
    torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=0)
    assert found.keys() == other.keys() == flags(loaded).keys()
    assert max(relative(found[name], other[name]) for name in other) < 1e-4


@pytest.mark.parametrize("kind", [GptOssModel, GptOssForSequenceClassification])
def test_the_routers_loss_needs_a_loss_that_knows_it(kind: Any) -> None:
    with pytest.raises(CompatibilityError, match=f"a GptOssForCausalLM, and {kind.__name__} knows none. Leave it out"):
        with_full_finetuning(tiny_model(kind=kind), router_aux_loss=0.1)
    model = with_full_finetuning(tiny_model(kind=kind)).train()
    model(ids())[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_options_that_cannot_be() -> None:
    for weight in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"router_aux_loss is .*\. Give a weight of 0 or more, or None"):
            with_full_finetuning(router_aux_loss=weight)
    with pytest.raises(ValueError, match="optimizer_state 'lion' is not known. Use one of 'adamw', 'adamw_8bit'"):
        with_full_finetuning(optimizer_state="lion")


# transformers' Trainer


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    settings = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    data = [{"input_ids": row, "labels": row} for row in ids(batch=40, length=12)]
    return Trainer(model=model, args=TrainingArguments(**{**settings, **options}), train_dataset=data)


def learned(model: Any, folder: Path, **options: Any) -> list[float]:
    one = trainer(model, folder, **options)
    one.train()
    return [row["loss"] for row in one.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    "options",
    [{}, {CHECKPOINTING: True}, {"gradient_accumulation_steps": 2}, {"bf16": True}],
    ids=["as it is", "its own checkpoints", "accumulation", "autocast"],
)
def test_the_trainer_learns_as_without_the_wrapper(tmp_path: Path, options: dict[str, Any]) -> None:
    make = tiny_model if "bf16" in options else exact
    model = with_full_finetuning(with_flash_attention(make().requires_grad_(False)))
    expected = learned(make(), tmp_path, **options)
    found = learned(model, tmp_path, **options)
    assert len(expected) == 6
    torch.testing.assert_close(found, expected, rtol=2e-2 if "bf16" in options else 1e-6, atol=0)
    assert model.model.layers[0].gradient_checkpointing
    assert not undo(model).model.layers[0].gradient_checkpointing


def test_the_trainer_resumes_to_the_same_curve(tmp_path: Path) -> None:
    expected = learned(with_full_finetuning(tiny_model(), router_aux_loss=0.5), tmp_path / "whole")
    options = {"save_strategy": "steps", "save_steps": 3}
    first = learned(with_full_finetuning(tiny_model(), router_aux_loss=0.5), tmp_path / "parts", **options)
    torch.testing.assert_close(first, expected, rtol=1e-6, atol=0)
    resumed = trainer(with_full_finetuning(tiny_model(seed=5), router_aux_loss=0.5), tmp_path / "parts", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    found = [row["loss"] for row in resumed.state.log_history if "loss" in row]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    # Negative control: a model that did not resume, from the same other weights, is elsewhere.
    other = learned(with_full_finetuning(tiny_model(seed=5), router_aux_loss=0.5), tmp_path / "other")
    assert abs(other[-1] / expected[-1] - 1) > 1e-2


def test_the_trainer_evaluates_with_the_routers_loss(tmp_path: Path) -> None:
    def evaluated(model: Any) -> float:
        one = trainer(model, tmp_path)
        return float(one.evaluate(one.train_dataset)["eval_loss"])

    found = evaluated(with_full_finetuning(tiny_model(), router_aux_loss=0.5))
    assert found == pytest.approx(evaluated(with_flags(0.5)), rel=1e-5)
    assert found > evaluated(tiny_model()) + 0.5


def test_in_the_trainer_the_routers_loss_counts_as_in_transformers(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2}
    plain = exact(output_router_logits=True, router_aux_loss_coef=0.5)
    expected = learned(plain, tmp_path, **options)
    found = learned(with_full_finetuning(exact(), router_aux_loss=0.5), tmp_path, **options)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    # Once for each of two batches: the page says so.
    assert found[0] - learned(with_full_finetuning(exact()), tmp_path, **options)[0] > 1.5


def test_accelerate_prepares_it() -> None:
    expected = trained_curve(exact())
    accelerator = accelerate.Accelerator(cpu=True)
    model = with_full_finetuning(exact()).train()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    losses = []
    for step in range(5):
        loss = model(ids(seed=step % 2), labels=ids(seed=step % 2)).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)
    assert not stack_of(undo(accelerator.unwrap_model(model)))

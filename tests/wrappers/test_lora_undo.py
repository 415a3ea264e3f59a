"""Trained adapters are not lost by accident; they can be switched off for a while, and a batcher notices both."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptoss_opt import (
    ContinuousBatcher,
    IrreversibleError,
    adapters_off,
    load_adapter,
    save_adapter,
    stack_of,
    undo,
    with_fast_experts,
    with_flash_attention,
    with_lora,
    with_mxfp4_experts,
)
from tests.helpers import ids, relative, tiny_model
from tests.materialised import adapters, begun
from tests.serve.conftest import alone, serve  # noqa: F401  (a fixture)

TARGETS = ("q_proj", "router", "lm_head", "gate_up_proj", "down_proj")


def trained(model: Any = None) -> Any:
    model = with_lora(tiny_model() if model is None else model, targets=TARGETS, rank=2)
    step(model)
    return model


def step(model: Any) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for seed in (3, 4):
        model(ids(seed=seed), labels=ids(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# Undo.

KEPT = r"with_lora\(.*\): it holds adapters that were trained and not saved. save_adapter\(model, path\) keeps them; "
KEPT += r"undo\(model, with_lora, discard=True\) drops it"

UNDO: dict[str, Callable[[Any], Any]] = {
    "all": undo,
    "by function": lambda model: undo(model, with_lora),
    "by name": lambda model: undo(model, "with_lora"),
    "with others": lambda model: undo(model, with_flash_attention, with_lora),
    "by stack": lambda model: undo(model, stack_of(model)),
}


@pytest.mark.parametrize("take_off", UNDO.values(), ids=UNDO)
def test_trained_adapters_are_not_dropped(take_off: Callable[[Any], Any], tmp_path: Path) -> None:
    model = with_flash_attention(trained(with_mxfp4_experts(tiny_model())))
    stack, logits = stack_of(model), model(ids()).logits
    with pytest.raises(IrreversibleError, match=KEPT):
        take_off(model)
    assert stack_of(model) == stack
    assert torch.equal(model(ids()).logits, logits)
    undo(model, with_flash_attention)  # which has nothing to lose
    with_flash_attention(model)
    # One way out: they are on disk.
    save_adapter(model, tmp_path)
    take_off(model)
    assert not adapters(model)
    assert relative(load_adapter(model, tmp_path)(ids()).logits, logits) < 1e-5


def test_the_other_way_out_drops_them() -> None:
    model = trained()
    assert undo(model, discard=True) is model
    assert not adapters(model)
    assert torch.equal(model(ids()).logits, tiny_model()(ids()).logits)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("once", ["on disk", "loaded", "copied", "pickled", "by save_pretrained", "of a state dict"])
def test_they_are_dropped_where_nothing_is_lost(once: str, tmp_path: Path) -> None:
    model = trained()
    if once == "on disk":
        save_adapter(model, tmp_path)
    elif once == "loaded":
        save_adapter(model, tmp_path)
        model = load_adapter(tiny_model(), tmp_path)
    elif once in ("copied", "pickled"):
        save_adapter(model, tmp_path)
        model = copy.deepcopy(model) if once == "copied" else pickle.loads(pickle.dumps(model))
    elif once == "by save_pretrained":
        model.save_pretrained(tmp_path)
    else:
        model.save_pretrained(tmp_path, state_dict=model.state_dict())
    with_mxfp4_experts(with_fast_experts(with_flash_attention(model)))
    twin = copy.deepcopy(model)
    assert not stack_of(undo(twin))
    # Trained once more, there is something to lose again.
    step(model)
    with pytest.raises(IrreversibleError, match=KEPT):
        undo(model)
    save_adapter(model, tmp_path)
    undo(model)


def test_adapters_that_were_never_trained_are_dropped() -> None:
    for change in (
        lambda model: model,
        lambda model: model.bfloat16(),
        lambda model: model(ids(), labels=ids()).loss.backward(),
        lambda model: with_mxfp4_experts(model),
        lambda model: model.load_state_dict(model.state_dict()),
    ):
        model = with_lora(tiny_model(), targets=TARGETS)
        change(model)
        assert not adapters(undo(model))


def test_one_changed_value_is_noticed(tmp_path: Path) -> None:
    model = begun(with_lora(tiny_model(), targets=TARGETS))
    save_adapter(model, tmp_path)
    for name, parameter in adapters(model).items():
        value = parameter.flatten()[-1].item()
        with torch.no_grad():
            parameter.view(-1)[-1] = value + 1e-3
        with pytest.raises(IrreversibleError):
            undo(model, with_lora)
        with torch.no_grad():
            parameter.view(-1)[-1] = value
        assert parameter.flatten()[-1] == value, name
    undo(model)


def test_a_failed_save_keeps_nothing(tmp_path: Path) -> None:
    model = trained()
    (tmp_path / "a file").write_text("")
    for path in (tmp_path / "a file", tmp_path / "a file" / "below"):
        with pytest.raises(OSError, match="a file"):
            save_adapter(model, path)
    with pytest.raises(ValueError, match="it has no lm_head.lora_A, which is trained"):
        model.save_pretrained(
            tmp_path, state_dict={k: v for k, v in model.state_dict().items() if k != "lm_head.lora_A"}
        )
    with pytest.raises(IrreversibleError, match=KEPT):
        undo(model)
    assert [file.name for file in tmp_path.iterdir()] == ["a file"]


def test_what_was_trained_of_the_base_stays() -> None:
    model = trained(with_lora(tiny_model(), targets=TARGETS, rank=2))
    undo(model, discard=True)
    with_lora(model, targets=("q_proj",), train="norm")
    step(model)
    changed = model.model.norm.weight.detach().clone()
    assert not torch.equal(changed, tiny_model().model.norm.weight)
    assert torch.equal(undo(model, discard=True).model.norm.weight, changed)


# Off for a while.


def test_adapters_off_is_the_base_and_nests() -> None:
    model = with_flash_attention(with_mxfp4_experts(trained()))
    base = with_flash_attention(with_mxfp4_experts(tiny_model()))(ids()).logits
    on = model(ids()).logits
    assert relative(on, base) > 1e-2
    with adapters_off(model):
        assert relative(model(ids()).logits, base) < 1e-6
        with adapters_off(model):
            assert relative(model(ids()).logits, base) < 1e-6
        assert relative(model(ids()).logits, base) < 1e-6
    assert torch.equal(model(ids()).logits, on)


def test_adapters_off_ends_with_an_exception() -> None:
    model = trained()
    on = model(ids()).logits
    with pytest.raises(RuntimeError, match="inside"), adapters_off(model):
        raise RuntimeError("inside")
    assert torch.equal(model(ids()).logits, on)


def test_adapters_stay_off_while_wrappers_come_and_go() -> None:
    model = trained()
    on, base = model(ids()).logits, tiny_model()(ids()).logits
    with adapters_off(model):
        with_mxfp4_experts(with_flash_attention(model))
        assert relative(model(ids()).logits, base) < 1e-5
        undo(model, with_flash_attention)
        assert relative(model(ids()).logits, base) < 1e-5
        model.model.layers[0].mlp.experts.config._experts_implementation = "eager"  # whose numbers are the base's
    undo(model, with_mxfp4_experts)
    with_lora(model, targets=TARGETS, rank=2)
    assert relative(model(ids()).logits, on) < 1e-5
    with adapters_off(model):
        undo(model, discard=True)
    assert not any("adapters" in name for module in model.modules() for name in module.__dict__)


def test_adapters_off_gives_no_gradients_and_another_model_keeps_its_own() -> None:
    model, other = trained(), trained()
    on = other(ids()).logits
    with adapters_off(model):
        assert not model(ids()).logits.requires_grad
        assert torch.equal(other(ids()).logits, on)
    assert model(ids()).logits.requires_grad
    nothing = "there are no adapters on this GptOssForCausalLM. Put some on it: with_lora"
    with pytest.raises(ValueError, match=nothing), adapters_off(tiny_model()):
        pass


def test_adapters_off_inside_other_modules() -> None:
    model = trained()
    around = torch.nn.Sequential(model)
    base = tiny_model()(ids()).logits
    with adapters_off(around):
        assert relative(around(ids()).logits, base) < 1e-5
    assert relative(around(ids()).logits, base) > 1e-2


# torch's own, while tracing.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_a_compiled_model_can_be_switched() -> None:
    model = trained(tiny_model(num_hidden_layers=1))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        on, base = model(ids()).logits, tiny_model(num_hidden_layers=1)(ids()).logits
        for _ in range(2):
            assert relative(compiled(ids()).logits, on) < 1e-5
            with adapters_off(model):
                assert relative(compiled(ids()).logits, base) < 1e-5


# While it is served.

PROMPT = ids(1, 40)[0].tolist()
NEW: dict[str, Any] = {"max_new_tokens": 8, "progress": False}


def tokens(model: Any) -> list[int]:
    """Of a fresh batcher."""
    with ContinuousBatcher(model, kv_memory=1 << 20) as batcher:
        return batcher.generate([PROMPT], **NEW)[0]


@pytest.mark.parametrize("packed", [False, True])
def test_a_batcher_notices_steps_and_switches(serve: Callable[..., ContinuousBatcher], packed: bool) -> None:  # noqa: F811
    model = with_lora(with_mxfp4_experts(tiny_model()) if packed else tiny_model(), targets=TARGETS, dropout=0.1)
    base = alone(model, PROMPT, max_new_tokens=8)
    batcher = serve(model)
    assert batcher.generate([PROMPT], **NEW) == [base]
    found = [base]
    for _ in range(2):
        model.train()
        step(model)
        model.eval()
        after = batcher.generate([PROMPT], **NEW)
        assert after == [alone(model, PROMPT, max_new_tokens=8)] != [found[-1]]
        found += after
        with adapters_off(model):
            assert batcher.generate([PROMPT], **NEW) == [base] == [alone(model, PROMPT, max_new_tokens=8)]
        assert batcher.generate([PROMPT], **NEW) == after
    shared = batcher.stats().prefix_tokens
    assert batcher.generate([PROMPT], **NEW) == after
    assert batcher.stats().prefix_tokens > shared, "pages of the same weights are used again"
    batcher.close()
    assert tokens(model) == found[-1]


def test_a_batcher_made_while_adapters_are_off() -> None:
    model = trained()
    on, base = alone(model, PROMPT, max_new_tokens=8), alone(tiny_model(), PROMPT, max_new_tokens=8)
    assert on != base
    with adapters_off(model):
        # It puts attention of its own on the model, before the adapters, and takes it off again.
        assert tokens(model) == base
        assert alone(model, PROMPT, max_new_tokens=8) == base
    assert tokens(model) == on


def test_loading_while_it_is_served(serve: Callable[..., ContinuousBatcher], tmp_path: Path) -> None:  # noqa: F811
    model, other = trained(), begun(with_lora(tiny_model(), targets=TARGETS, rank=2), seed=11)
    save_adapter(other, tmp_path)
    expected = alone(other, PROMPT, max_new_tokens=8)
    batcher = serve(model)
    before = batcher.generate([PROMPT], **NEW)
    load_adapter(model, tmp_path)
    assert batcher.generate([PROMPT], **NEW) == [expected] != before


def gathered(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def test_save_pretrained_refuses_what_it_does_not_do(tmp_path: Path) -> None:
    model = trained()
    for options in ({"push_to_hub": True}, {"variant": "fp8"}, {"save_peft_format": False}):
        with pytest.raises(ValueError, match=r"save_pretrained\(\w+=.*\) is not served on a model with adapters"):
            model.save_pretrained(tmp_path, **options)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path, max_shard_size="5GB", safe_serialization=True)
    assert gathered(tmp_path)["r"] == 2
    changed: dict[str, Tensor] = {name: 2 * value for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=changed)
    twin = load_adapter(tiny_model(), tmp_path)
    assert all(torch.equal(p, changed[name]) for name, p in adapters(twin).items())

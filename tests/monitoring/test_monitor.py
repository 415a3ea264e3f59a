"""The monitor: what it measures is right, the forwards between are untouched, and nothing hides."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from gptoss_opt import (
    CompatibilityError,
    ContinuousBatcher,
    compose,
    monitor_of,
    optimize,
    undo,
    with_chunked_loss,
    with_fast_linears,
    with_flash_attention,
    with_lora,
    with_monitor,
    with_mxfp4_experts,
)
from gptoss_opt.model.plain import sink_share
from gptoss_opt.monitoring import monitor as module
from gptoss_opt.monitoring import outputs
from tests.helpers import ids, relative, tiny_model

STACK = compose(with_flash_attention(), with_mxfp4_experts(), with_lora(rank=4), with_chunked_loss())


def train(model: Any, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    losses = []
    for step in range(steps):
        loss = model(ids(seed=step), labels=ids(seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("every", [1, 3])
def test_numbers_stay_and_one_of_every_few_is_measured(every: int) -> None:
    torch.manual_seed(0)
    expected = train(STACK(tiny_model()).train(), 7)
    torch.manual_seed(0)
    model = compose(STACK, with_monitor(every=every, to=()))(tiny_model()).train()
    assert train(model, 7) == expected
    found = monitor_of(model)
    assert [step.number for step in found.steps] == list(range(1, 8, every))
    assert [step.loss for step in found.steps] == pytest.approx(expected[::every])
    assert found.calls == 7
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.model.layers.modules())


def test_what_is_measured() -> None:
    model = with_monitor(with_flash_attention(tiny_model()), every=2, to=()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    norms = []
    for _ in range(5):
        model(ids(), labels=ids()).loss.backward()
        norms.append(float(torch.nn.utils.get_total_norm([one.grad for one in model.parameters()])))
        optimizer.step()
        optimizer.zero_grad()
    first, second, last = monitor_of(model).steps
    assert (first.grad_norm, first.tokens_per_second) == (None, None)
    assert last.grad_norm == pytest.approx(norms[0], rel=1e-5)
    assert second.tokens_per_second is not None
    assert last.tokens == ids().numel()
    assert sum(last.parts.values()) == pytest.approx(last.seconds, rel=0.05)
    assert all(value >= 0 for value in last.parts.values())
    assert 0 < last.parts["attention"] < last.seconds
    assert 0 < last.memory <= last.peak * 1.1
    # Every token goes to some experts, in each layer.
    assert [sum(layer) for layer in last.load] == [ids().numel() * model.config.num_experts_per_tok] * 3
    assert last.imbalance == max(max(layer) / (sum(layer) / len(layer)) for layer in last.load)
    assert 1 <= last.imbalance <= model.config.num_local_experts


def test_the_sinks_are_what_eager_attention_gives_them() -> None:
    model = tiny_model()
    expected = []

    def hook(attention: Any, args: Any, kwargs: Any, out: Any) -> None:
        # transformers drops the column of the sink: what is missing from the weights is the sink's.
        expected.append(float(1 - out[1].detach()[:, :, -1].sum(-1).mean()))
        assert float(sink_share(attention, kwargs | {"attention_mask": None})) == pytest.approx(expected[-1], abs=1e-5)

    handles = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in model.model.layers]
    model(ids(), use_cache=False)
    for handle in handles:
        handle.remove()
    watched = with_monitor(with_flash_attention(model), every=1, to=())
    watched(ids())
    assert monitor_of(watched).steps[0].sinks == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-3
    # Beside a cache, or under a mask, not all keys are there.
    mask = torch.ones_like(ids())
    mask[0, :2] = 0
    monitor_of(watched).steps.clear()
    watched(ids(), attention_mask=mask)
    assert monitor_of(watched).steps[0].sinks == [None] * 3


def test_a_kernel_that_was_replaced_is_an_error() -> None:
    model = with_monitor(with_flash_attention(tiny_model()), every=1, to=())
    model(ids())
    model.config._attn_implementation = "eager"
    with pytest.raises(CompatibilityError, match=r"with_flash_attention\(\): what it set on the model was changed"):
        model(ids())


def test_decoding_and_serving_are_measured() -> None:
    stack = compose(with_flash_attention(), with_mxfp4_experts(), with_fast_linears())
    plain = stack(tiny_model())
    expected = plain.generate(ids(), max_new_tokens=6, do_sample=False)
    model = compose(stack, with_monitor(every=2, to=()))(tiny_model())
    assert torch.equal(model.generate(ids(), max_new_tokens=6, do_sample=False), expected)
    assert [step.tokens for step in monitor_of(model).steps] == [ids().numel(), 2, 2]
    prompts = [[2, 3, 4], [5, 6]]
    with ContinuousBatcher(plain, kv_memory=1 << 22) as batcher:
        answers = batcher.generate(prompts, max_new_tokens=5, progress=False)
    before = len(monitor_of(model).steps)
    with ContinuousBatcher(model, kv_memory=1 << 22) as batcher:
        assert batcher.generate(prompts, max_new_tokens=5, progress=False) == answers
    assert len(monitor_of(model).steps) > before


def test_where_steps_are_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "steps.jsonl"
    model = with_monitor(tiny_model(), every=1, to=("log", str(path)))
    with caplog.at_level(logging.INFO, "gptoss_opt"):
        model(ids(), labels=ids())
        model(ids(), labels=ids())
    assert [record.message.split(":")[0] for record in caplog.records] == ["step 1", "step 2"]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["number"] for row in rows] == [1, 2]
    assert rows[1] == json.loads(json.dumps(monitor_of(model).steps[1].to_dict()))


def test_dashboards(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[dict[str, float]] = []
    monkeypatch.setattr(outputs.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(outputs, "_writer", lambda to: lambda step: written.append(step.numbers()))
    model = with_monitor(tiny_model(), every=1, to=("wandb",))
    model(ids(), labels=ids())
    assert {"loss", "memory", "seconds/attention", "seconds/head_and_loss", "imbalance"} <= set(written[0])
    assert "grad_norm" not in written[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every": 0}, "every is 0"),
        ({"every": 2.0}, "every is 2.0"),
        ({"to": "log"}, r"to=\('log', 'steps.jsonl'\)"),
        ({"to": ("telegraph",)}, "steps cannot be written to 'telegraph'"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        with_monitor(**options)


def test_a_dashboard_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install mlflow"):
        with_monitor(to=("mlflow",))


def test_it_is_shown(tmp_path: Path) -> None:
    model = with_monitor(tiny_model(), every=1, to=()).train()
    train(model, 3)
    shown = str(monitor_of(model).report())
    assert shown.splitlines()[0].split()[:3] == ["step", "tokens/s", "attention"]
    assert len(shown.splitlines()) == 5
    pytest.importorskip("matplotlib")
    figure = monitor_of(model).plot(str(tmp_path / "steps.png"))
    assert (tmp_path / "steps.png").stat().st_size > 5000
    assert [axes.get_title() for axes in figure.axes][:3] == ["loss", "tokens/s", "memory, GB"]


def test_memory_stands_beside_the_plan(tmp_path: Path) -> None:
    model = with_monitor(optimize(tiny_model(torch.bfloat16), context=64), every=1, to=())
    model(ids())
    assert monitor_of(model).steps[0].planned == model.plan.peak_bytes


def test_models_are_copied_and_pickled_and_it_comes_off() -> None:
    model = with_monitor(tiny_model(), every=1, to=())
    model(ids())
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    other(ids())
    assert (monitor_of(model).calls, monitor_of(other).calls) == (1, 2)
    # Other wrappers come and go: the counters stay.
    with_flash_attention(model)
    model(ids())
    assert monitor_of(model).calls == 2
    undo(model)
    with pytest.raises(ValueError, match="no monitor"):
        monitor_of(model)
    assert not module.MEASURED or model in module.MEASURED


def test_the_loss_is_that_of_the_model() -> None:
    model = with_monitor(tiny_model(), every=1, to=())
    logits = model(ids(), labels=ids()).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())
    assert relative(torch.tensor(monitor_of(model).steps[0].loss), expected) < 1e-5


def test_what_is_compiled_is_not_measured() -> None:
    model = with_monitor(with_flash_attention(tiny_model(num_hidden_layers=1)), every=1, to=())
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = model(ids(), use_cache=False).logits
        before = monitor_of(model).calls
        for _ in range(3):
            torch.testing.assert_close(compiled(ids(), use_cache=False).logits, expected)
    assert monitor_of(model).calls == before

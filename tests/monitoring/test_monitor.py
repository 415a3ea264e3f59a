"""The monitor: what it measures is right, the forwards between are untouched, and nothing hides."""

from __future__ import annotations

import copy
import gc
import json
import logging
import pickle
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator, cpu_offload
from accelerate.state import AcceleratorState
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import GptOssModel, Trainer, TrainerCallback, TrainingArguments

from gptoss_opt import (
    CompatibilityError,
    ContinuousBatcher,
    compose,
    explain,
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
from gptoss_opt.distributed.collectives import OBSERVERS
from gptoss_opt.model.sinks import sink_share
from gptoss_opt.model.trainer import MonitorCallback
from gptoss_opt.model.training import CHECKPOINTING
from gptoss_opt.monitoring import monitor as module
from gptoss_opt.monitoring import outputs
from gptoss_opt.monitoring.meter import Meter
from tests.finetune.chats import tokenizer
from tests.helpers import ids, relative, tiny_model

# peft and TRL ask transformers by names that it deprecates.
DEPRECATED = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
STACK = compose(with_flash_attention(), with_mxfp4_experts(), with_lora(rank=4), with_chunked_loss())


def train(model: Any, steps: int, lr: float = 0.1) -> list[float]:
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=lr)
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
    assert first.tokens_per_second is None
    assert [step.grad_norm for step in (first, second, last)] == pytest.approx(norms[::2], rel=1e-5)
    assert second.tokens_per_second is not None
    assert last.tokens == ids().numel()
    assert last.kernels == {"attention": explain(model).rows[0].backend, "experts": "grouped_mm"}
    assert last.parts["communication"] == 0
    assert all(value > 0 for part, value in last.parts.items() if part != "communication")
    assert 0 < last.memory <= last.peak * 1.1
    # Every token goes to some experts, in each layer.
    assert [sum(layer) for layer in last.load] == [ids().numel() * model.config.num_experts_per_tok] * 3
    assert last.imbalance == max(max(layer) / (sum(layer) / len(layer)) for layer in last.load)
    assert 1 <= last.imbalance <= model.config.num_local_experts


def test_the_backward_pass_is_measured_too() -> None:
    model = with_monitor(with_flash_attention(tiny_model(hidden_size=128)), every=1, to=()).train()
    tokens = torch.cat([ids(seed=seed) for seed in range(8)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    forward, both = 0.0, 0.0
    for _ in range(6):
        begin = time.perf_counter()
        loss = model(tokens, labels=tokens).loss
        forward += time.perf_counter() - begin
        loss.backward()
        both += time.perf_counter() - begin
        # Neither what comes between the passes and the optimizer, nor the optimizer.
        time.sleep(0.01)
        optimizer.step()
        optimizer.zero_grad()
    steps = monitor_of(model).steps
    assert sum(step.seconds for step in steps) == pytest.approx(both, rel=0.1)
    # Negative control: the forwards alone are far less.
    assert forward < 0.8 * both
    for part in ("attention", "experts", "head and loss"):
        with torch.no_grad():
            model(tokens, labels=tokens)
        assert monitor_of(model).steps[-1].parts[part] < steps[-1].parts[part]


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_computed_again(reentrant: bool) -> None:
    torch.manual_seed(0)
    expected = train(STACK(tiny_model()).train(), 3)
    torch.manual_seed(0)
    model = compose(STACK, with_monitor(every=1, to=()))(tiny_model()).train()
    getattr(model, CHECKPOINTING)({"use_reentrant": reentrant})
    assert train(model, 3) == pytest.approx(expected, rel=1e-6)
    # What is computed again is not counted again.
    assert [len(step.load) for step in monitor_of(model).steps] == [3] * 3
    assert all(step.parts["experts"] > 0 for step in monitor_of(model).steps)


def test_a_step_is_done_when_the_optimizer_is(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    model = with_monitor(tiny_model(), every=1, to=(str(path),)).train()
    optimizers = [torch.optim.SGD([one], lr=0.0) for one in model.parameters()]
    model(ids(), labels=ids()).loss.backward()
    assert not path.exists()
    norm = float(torch.nn.utils.get_total_norm([one.grad for one in model.parameters()]))
    other = torch.nn.Parameter(torch.ones(1))
    other.grad = torch.ones(1)
    torch.optim.SGD([other]).step()  # of no parameter of the model
    assert not path.exists()
    for optimizer in optimizers:
        optimizer.step()
    # The norm is that of all gradients, whichever optimizer is first.
    assert [json.loads(line)["grad_norm"] for line in path.read_text().splitlines()] == pytest.approx([norm])
    # A forward without an optimizer is done when the next one is measured.
    model(ids(), labels=ids())
    model(ids(), labels=ids())
    assert len(path.read_text().splitlines()) == 2
    # The last one can be looked at before it is done, and is no other for it.
    assert [step.grad_norm for step in monitor_of(model).steps] == [pytest.approx(norm), None, None]
    copy.deepcopy(model)
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize("every", [1, 3, 4])
def test_gradients_that_are_gathered_over_several_forwards(every: int) -> None:
    model = with_monitor(tiny_model(), every=every, to=()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    norms: list[float] = []
    for number in range(12):
        model(ids(seed=number), labels=ids(seed=number)).loss.backward()
        if number % 2:
            norms += [float(torch.nn.utils.get_total_norm([one.grad for one in model.parameters()]))] * 2
            optimizer.step()
            optimizer.zero_grad()
    for step in monitor_of(model).steps:
        # One that is followed by another that is measured, before the optimizer, has none.
        expected = None if every == 1 and step.number % 2 else pytest.approx(norms[step.number - 1], rel=1e-5)
        assert step.grad_norm == expected


def test_an_optimizer_within_the_backward_pass(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    model = with_monitor(tiny_model(), every=1, to=(str(path),)).train()
    optimizers = {one: torch.optim.SGD([one], lr=0.0) for one in model.parameters()}
    for one in model.parameters():
        one.register_post_accumulate_grad_hook(lambda parameter: optimizers[parameter].step())
    for _ in range(3):
        model(ids(), labels=ids()).loss.backward()
        model.zero_grad()
    steps = monitor_of(model).steps
    # No optimizer has seen all gradients.
    assert [step.grad_norm for step in steps] == [None] * 3
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == json.loads(json.dumps([step.to_dict() for step in steps[:2]]))
    assert all(row["parts"]["experts"] > 0 for row in rows)


def test_a_whole_model_that_is_computed_again() -> None:
    model = with_monitor(tiny_model(), every=1, to=()).train()
    loss = checkpoint(lambda: model(ids(), labels=ids()).loss, use_reentrant=False)
    loss.backward()
    assert monitor_of(model).calls == 1
    assert len(monitor_of(model).steps[0].load) == 3


def test_other_threads() -> None:
    model = with_monitor(with_flash_attention(tiny_model()), every=1, to=())
    with torch.no_grad():
        expected = model(ids()).logits
    failed: list[BaseException] = []

    def infer() -> None:
        try:
            with torch.no_grad():
                for _ in range(20):
                    torch.testing.assert_close(model(ids()).logits, expected)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=infer) for _ in range(3)]
    for one in threads:
        one.start()
    train(model.train(), 5, lr=0.0)
    for one in threads:
        one.join()
    assert not failed
    assert monitor_of(model).calls == 1 + 3 * 20 + 5
    routes = ids().numel() * model.config.num_experts_per_tok
    for step in monitor_of(model).steps:
        assert [sum(layer) for layer in step.load] == [routes] * 3


def test_other_threads_while_hooks_are_removed() -> None:
    model = tiny_model()
    meter = Meter(model, sinks=True)
    # torch forgets that a hook takes keywords before it forgets the hook: another thread may call it without them.
    calls = [
        (hook, (module, ()) if kind == "_forward_pre_hooks" else (module, (), None))
        for module in model.modules()
        for kind in ("_forward_pre_hooks", "_forward_hooks")
        for hook in getattr(module, kind).values()
    ]
    with ThreadPoolExecutor(1) as other:
        assert [other.submit(hook, *given).result() for hook, given in calls] == [None] * len(calls)
    assert len(calls) > 10
    assert not meter.load
    # Negative control: in its own thread they are no calls of these hooks.
    with pytest.raises(TypeError):
        calls[0][0](*calls[0][1])
    meter.close()


@DEPRECATED
@pytest.mark.parametrize("around", ["accelerate", "offloaded", "peft"])
def test_what_others_put_around_a_model(around: str, tmp_path: Path) -> None:
    stack = compose(with_flash_attention(), with_fast_linears(), with_chunked_loss(), with_monitor(every=1, to=()))
    model = stack(tiny_model())
    AcceleratorState._reset_state(reset_partial_state=True)  # of whatever ran before in this process
    if around == "accelerate":
        outer = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    elif around == "offloaded":
        outer = cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        outer = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    outer(input_ids=ids(), labels=ids())
    assert monitor_of(model).calls == 1
    assert "changed by you" not in str(explain(model))
    # Negative control: a forward of a part that does not call ours.
    monitor_of(model).close()
    attention: Any = model.model.layers[0].self_attn
    attention.q_proj.forward = lambda hidden: hidden
    if around == "peft":
        attention.q_proj.base_layer.forward = lambda hidden: hidden
    with pytest.raises(CompatibilityError, match="changed since"):
        outer(input_ids=ids(), labels=ids())


@DEPRECATED
def test_trl_which_has_a_forward_of_its_own(tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = with_monitor(STACK(tiny_model()), every=1, to=())
    rows = datasets.Dataset.from_dict({"input_ids": torch.cat([ids(seed=seed) for seed in range(4)]).tolist()})
    settings = {"use_cpu": True, "bf16": False, "report_to": [], "max_steps": 2, "router_aux_loss_coef": 0.0}
    arguments = trl.SFTConfig(str(tmp_path), logging_steps=1, save_strategy="no", **settings)
    trainer = trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer(None))
    trainer.train()
    assert [step.number for step in monitor_of(model).steps] == [1, 2]
    assert all(step.grad_norm for step in monitor_of(model).steps)
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["gptoss_opt/grad_norm"] for row in history] == [step.grad_norm for step in monitor_of(model).steps]


def test_callbacks_of_trainers_are_pickled(tmp_path: Path) -> None:
    model = with_monitor(tiny_model(), every=1, to=())
    settings = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    trainer = Trainer(model, settings, train_dataset=[{"input_ids": row, "labels": row} for row in ids()])
    trainer.train()
    found = [one for one in trainer.callback_handler.callbacks if isinstance(one, MonitorCallback)]
    assert len(found) == 1
    assert pickle.loads(pickle.dumps(found[0])).on_save(None) is None


def test_fused_optimizers_and_scales() -> None:
    model = with_monitor(tiny_model(), every=1, to=()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
    (model(ids(), labels=ids()).loss * 1024).backward()
    norm = float(torch.nn.utils.get_total_norm([one.grad for one in model.parameters()]))
    # As torch.amp.GradScaler leaves them to a fused optimizer.
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    optimizer.step()
    assert monitor_of(model).steps[0].grad_norm == pytest.approx(norm / 1024)


def test_numbers_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "steps.jsonl"
    model = with_monitor(tiny_model(), every=1, to=(str(path),))
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with torch.no_grad():
        model(ids(), labels=ids())
        logits = model(ids(), labels=ids(), return_dict=False)[1]
    rows = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [row["loss"] for row in rows] == ["nan", "nan"]
    assert logits.dim() == 3


def test_pictures_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"gptoss-opt\[train\]"):
        monitor_of(with_monitor(tiny_model())).plot()


def test_steps_that_are_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 2)
    monkeypatch.setattr(module, "SINKS_EVERY", 3)
    model = with_monitor(with_flash_attention(tiny_model()), every=1, to=())
    sinks = []
    with torch.no_grad():
        for _ in range(7):
            model(ids(), use_cache=False)
            sinks.append(bool(monitor_of(model).steps[-1].sinks))
    assert sinks == [True, False, False, True, False, False, True]
    assert [step.number for step in monitor_of(model).steps] == [6, 7]


def test_a_forward_that_fails_leaves_nothing() -> None:
    gc.collect()  # of models of other tests that were never trained
    model = with_monitor(tiny_model(), every=1, to=())
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids())
    handle.remove()
    assert not OBSERVERS
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.model.layers.modules())
    with torch.no_grad():
        model(ids())
    assert [step.number for step in monitor_of(model).steps] == [2]
    assert not OBSERVERS


def test_trainers_log_it(tmp_path: Path) -> None:
    model = with_monitor(STACK(tiny_model()), every=2, to=()).train()
    settings = TrainingArguments(str(tmp_path), max_steps=6, logging_steps=2, report_to=[], use_cpu=True)
    seen: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(dict(logs))

    rows = [{"input_ids": row, "labels": row} for row in torch.cat([ids(seed=seed) for seed in range(8)])]
    trainer = Trainer(model, settings, train_dataset=rows, callbacks=[Reporter()])
    trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    steps = monitor_of(model).steps
    assert [step.number for step in steps] == [1, 3, 5]
    for row, reported, step in zip(history, seen, steps, strict=False):
        expected = {f"gptoss_opt/{name}": value for name, value in step.numbers().items()}
        assert {name: value for name, value in row.items() if name in expected} == expected
        assert {name: value for name, value in reported.items() if name in expected} == expected
    # Negative control: without a monitor there is nothing.
    undo(model, with_monitor)
    trainer.train()
    assert not any(name.startswith("gptoss_opt/") for row in trainer.state.log_history[-2:] for name in row)


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
    watched = with_monitor(undo(watched, with_monitor), every=1, to=())
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
        train(model, 2)
    assert [record.message.split(":")[0] for record in caplog.records] == ["step 1", "step 2"]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["number"] for row in rows] == [1, 2]
    assert rows[1] == json.loads(json.dumps(monitor_of(model).steps[1].to_dict()))


def test_dashboards(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[dict[str, float]] = []
    monkeypatch.setattr(outputs.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(outputs, "_writer", lambda to: lambda step: written.append(step.numbers()))
    model = with_monitor(tiny_model(), every=1, to=("wandb",))
    with torch.no_grad():
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
    memory = figure.axes[2]
    assert memory.get_ylim()[0] == 0
    assert memory.get_ylim()[1] > 1.02 * max(memory.lines[0].get_ydata())


def test_it_is_shown_in_a_notebook() -> None:
    model = with_monitor(tiny_model(), every=1, to=()).train()
    train(model, 3)
    monitor = monitor_of(model)
    assert monitor._repr_html_() == monitor.report()._repr_html_()
    assert "Step(" not in repr(monitor), "as many as there are steps"
    pytest.importorskip("matplotlib")
    assert monitor.plot()._repr_png_().startswith(b"\x89PNG")


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


def test_a_model_without_a_head() -> None:
    model = with_monitor(with_flash_attention(tiny_model(kind=GptOssModel)), every=1, to=())
    model(ids())[0].sum().backward()
    step = monitor_of(model).steps[0]
    assert step.parts["head and loss"] == 0
    assert step.parts["experts"] > 0
    assert step.loss is None

"""Plans: what they choose and say, and that their code does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, LlamaConfig

from gptoss_opt import (
    CompatibilityError,
    ContinuousBatcher,
    HardwareError,
    PlanError,
    Stack,
    optimize,
    plan,
    stack_of,
    with_flash_attention,
    with_lora,
    with_mxfp4_experts,
)
from gptoss_opt.core.spec import WRAPPERS
from gptoss_opt.layout import Axis, LayoutError
from gptoss_opt.planner import Hardware, described
from gptoss_opt.planner.options import options
from gptoss_opt.planner.target import target_of
from gptoss_opt.planner.workload import Workload
from gptoss_opt.testing import random_checkpoint
from tests.helpers import ids, tiny_model


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("plan") / "tiny")


def names(found: Any) -> list[str]:
    return [wrapper.name for wrapper in found.stack]


# What it chooses.

FLASH, PACKED, TENSOR, EXPERTS = (
    "with_flash_attention",
    "with_mxfp4_experts",
    "shard_tensor_parallel",
    "shard_experts",
)


@pytest.mark.parametrize(
    ("size", "hardware", "options", "taken"),
    [
        # What an article on serving this model advises: the floor.
        ("20b", "2x24GB", {}, {FLASH, TENSOR}),
        ("120b", "4xA100-40GB", {}, {FLASH, EXPERTS}),
        ("120b", "4x40GB", {}, {FLASH, EXPERTS}),
        ("20b", "1xH100", {}, {FLASH}),
        ("20b", "2xH100", {}, {TENSOR}),
        ("120b", "8xH100", {}, {TENSOR, EXPERTS}),
        # And beyond it.
        ("20b", "1x16GB", {}, {PACKED}),
        ("20b", "1x16GB", {"task": "lora", "context": 1024}, {PACKED, "with_lora", "with_chunked_loss"}),
        ("120b", "1x80GB", {}, {PACKED}),
        ("20b", "cpu:16GB", {}, {PACKED, "with_fast_linears"}),
        ("120b", "8xH100", {"task": "lora"}, {PACKED, "with_lora", TENSOR}),
        ("20b", "8xH100", {"task": "full"}, {"with_full_finetuning", EXPERTS}),
        ("120b", "2x(8xH100)", {"task": "serve", "batch": 64}, {TENSOR, EXPERTS}),
    ],
)
def test_advice(size: str, hardware: str, options: dict[str, Any], taken: set[str]) -> None:
    found = plan(size, hardware=hardware, **options)
    assert found.fits, str(found)
    assert taken <= set(names(found)), names(found)
    assert found.headroom == found.usable - found.peak_bytes >= 0
    assert (found.launch is None) == (described(hardware).count == 1)


def test_one_device_is_not_sharded() -> None:
    assert not {TENSOR, EXPERTS} & set(names(plan("20b", hardware="1xH100")))


def test_requests_of_various_lengths_are_served_by_continuous_batching() -> None:
    found = plan("20b", hardware="1xH100", task="serve", batch=64)
    assert "ContinuousBatcher(model, max_num_sequences=64)" in found.code


def test_what_does_not_fit_says_by_how_much_and_what_would() -> None:
    found = plan("20b", hardware="1xL4", task="full", context=2048)
    assert not found.fits
    assert found.headroom < 0
    assert f"{-found.headroom / 1e9:,.1f} more than there are" in found.verdict
    assert any("task='lora'" in one for one in found.to_fit)
    assert plan("20b", hardware="1xL4", task="lora", context=2048).fits
    more = next(one for one in found.to_fit if "of these devices" in one)
    assert plan("20b", hardware=f"{more.split()[0]}xL4", task="full", context=2048).fits


def test_a_shorter_context_is_offered_where_it_helps() -> None:
    found = plan("20b", hardware="1x16GB", context=131_072)
    assert not found.fits
    shorter = int(found.to_fit[0].split("=")[1].split()[0])
    assert shorter == found.max_context
    assert plan("20b", hardware="1x16GB", context=shorter).fits
    assert not plan("20b", hardware="1x16GB", context=shorter + 1).fits


def test_a_smaller_batch_is_offered_where_it_helps() -> None:
    found = plan("20b", hardware="cpu:16GB", batch=64)
    smaller = next(int(one.split("=")[1].split()[0]) for one in found.to_fit if one.startswith("batch="))
    assert smaller == found.max_batch
    assert plan("20b", hardware="cpu:16GB", batch=smaller).fits
    assert not plan("20b", hardware="cpu:16GB", batch=smaller + 1).fits


def test_objectives() -> None:
    fit = plan("20b", hardware="8xH100", task="lora")
    most = plan("20b", hardware="8xH100", task="lora", objective="throughput")
    assert fit.ranks == 8
    assert most.ranks == 1  # a whole model on each, for other rows
    assert most.speed["training"].tokens_per_second > fit.speed["training"].tokens_per_second
    assert any("data parallel" in one for one in most.warnings)
    fast = plan("120b", hardware="2xH100", objective="latency")
    assert fast.ranks == 2


def test_dense_weights_are_rounded_only_where_they_must_be() -> None:
    config = GptOssConfig(num_hidden_layers=24, num_local_experts=32)
    assert PACKED not in names(plan(config, hardware="1xH100"))
    found = plan(config, hardware="1xL4")
    assert found.fits
    assert PACKED in names(found)
    assert any("rounded" in one for one in found.warnings)
    assert not any("rounded" in one for one in plan("20b", hardware="1xL4").warnings)


# What it says.


@pytest.mark.parametrize("task", ["generate", "serve", "lora", "full"])
@pytest.mark.parametrize("hardware", ["1xH100", "2x24GB", "8xH200", "cpu:24GB", "3xA40"])
def test_every_wrapper_has_a_reason(task: Any, hardware: str) -> None:
    found = plan("20b", hardware=hardware, task=task)
    assert set(found.reasons) == set(WRAPPERS)
    assert set(names(found)) <= set(found.reasons)
    assert all(reason and not reason.endswith(".") for reason in found.reasons.values())
    ours = [name for name, wrapper in WRAPPERS.items() if wrapper.__module__.startswith("gptoss_opt.")]
    assert not any("not one of this package" in found.reasons[name] for name in ours)


def test_all_of_it_is_json_and_the_stack_comes_back() -> None:
    found = plan("20b", hardware="2x24GB")
    facts = json.loads(json.dumps(found.to_dict()))
    assert Stack.from_json(facts["stack"]) == found.stack
    assert facts["peak_bytes"] == sum(facts["memory"].values())
    assert facts["work"]["task"] == "generate"


def test_it_is_shown() -> None:
    found = plan("20b", hardware="1xL4", task="full")
    for shown in (str(found), found._repr_html_()):
        for part in ("does not fit", "with_lora", "optimizer", "tokens/s", "To make it fit", "import"):
            assert part in shown, part
    assert "<table>" in found._repr_html_()


def test_hours() -> None:
    found = plan("20b", hardware="1xH100", task="lora")
    assert found.hours(1e9) == pytest.approx(1e9 / found.speed["training"].tokens_per_second / 3600)
    with pytest.raises(ValueError, match="trains nothing"):
        plan("20b", hardware="1xH100").hours(1)


@pytest.mark.parametrize(
    ("model", "options", "error", "said"),
    [
        ("20b", {"task": "dream"}, ValueError, "'generate', 'serve', 'lora', 'full'"),
        ("20b", {"context": 0}, ValueError, "context is 0"),
        ("20b", {"batch": 1.5}, ValueError, "batch is 1.5"),
        ("20b", {"objective": "cheap"}, ValueError, "'fit', 'latency', 'throughput'"),
        ("20b", {"hardware": "a laptop"}, HardwareError, "Known are"),
        (3, {}, TypeError, "plan was given a int"),
        ("20b", {"hardware": "5x(7xL4)", "task": "full"}, None, ""),
    ],
)
def test_what_cannot_be(model: Any, options: dict[str, Any], error: type[Exception] | None, said: str) -> None:
    options = {"hardware": "1xH100", **options}
    if error is None:
        assert plan(model, **options).reasons
        return
    with pytest.raises(error, match=said):
        plan(model, **options)


# That its code does it.


@pytest.mark.parametrize("task", ["generate", "serve", "lora", "full"])
def test_the_code_runs(path: Path, task: Any) -> None:
    found = plan(path, hardware="cpu:24GB", task=task, context=64)
    scope: dict[str, Any] = {}
    exec(found.code, scope)
    model = scope["model"]
    assert stack_of(model) == found.stack
    if task == "serve":
        assert isinstance(scope["batcher"], ContinuousBatcher)
        scope["batcher"].close()
    assert model.training == (task in ("lora", "full"))


def test_the_code_for_a_model_that_is_there() -> None:
    scope: dict[str, Any] = {"model": tiny_model(torch.bfloat16)}
    found = plan(scope["model"], hardware="cpu:24GB")
    assert PACKED not in names(found)
    exec(found.code, scope)
    assert stack_of(scope["model"]) == found.stack


def test_a_wrapped_model_is_planned_as_it_is_held() -> None:
    model = with_mxfp4_experts(tiny_model(torch.bfloat16))
    found = plan(model, hardware="cpu:24GB")
    assert PACKED in names(found)
    assert not any("rounded" in one for one in found.warnings)


def test_optimize_loads_and_wraps(path: Path) -> None:
    model = optimize(path, context=64)
    assert stack_of(model) == model.plan.stack
    assert model.plan.fits
    assert model.generate(ids(), max_new_tokens=2).shape == (2, 23)
    plain = tiny_model(torch.bfloat16)
    assert optimize(plain, task="lora", context=64) is plain
    assert "with_lora" in names(plain.plan)


def test_optimize_changes_nothing_where_it_cannot(path: Path) -> None:
    with pytest.raises(PlanError, match=r"It does not fit.*To make it fit"):
        optimize("120b", hardware=described("cpu:16GB"))
    two = Hardware(described("cpu:24GB").device, per_node=2)
    model = tiny_model()
    with pytest.raises(PlanError, match="2 processes, and there are 1. Start the script so: torchrun"):
        optimize(model, hardware=two, context=64)
    assert not len(stack_of(model))


def test_what_cannot_be_laid_out_is_said() -> None:
    # One key head per device, of which there are 8, and 4 experts.
    config = GptOssConfig(num_hidden_layers=2, num_local_experts=4, num_key_value_heads=3, num_attention_heads=9)
    found = plan(config, hardware="16xH100")
    assert found.ranks == 1
    with pytest.raises(LayoutError, match="no layers"):
        plan(GptOssConfig(num_hidden_layers=0), hardware="1xH100")


def test_what_cannot_be_packed_stays_dense() -> None:
    config = GptOssConfig(num_hidden_layers=2, num_local_experts=4, hidden_size=80, intermediate_size=48)
    assert PACKED not in names(plan(config, hardware="cpu:24GB"))


# Models that are wrapped already, and machines of every kind.


@pytest.mark.parametrize("task", ["generate", "lora", "full"])
def test_optimize_twice(task: Any) -> None:
    model = optimize(tiny_model(torch.bfloat16), task=task, context=64)
    before = stack_of(model)
    assert stack_of(optimize(model, task=task, context=64)) == before
    assert set(model.plan.reasons.values()) >= {"it is on the model already"}


def test_what_is_on_a_model_stays_with_its_options() -> None:
    model = with_flash_attention(with_lora(tiny_model(torch.bfloat16), rank=2), backend="torch")
    found = plan(model, hardware="cpu:24GB", context=64)
    assert {with_lora(rank=2), with_flash_attention(backend="torch")} <= set(found.stack)
    assert found.memory.weights["adapters"] > 0
    scope = {"model": model}
    exec(found.code, scope)
    assert stack_of(scope["model"]) == found.stack


def test_what_cannot_stand_with_what_is_on_a_model_is_refused() -> None:
    with pytest.raises(LayoutError, match="packed weights take no gradient"):
        plan(with_mxfp4_experts(tiny_model(torch.bfloat16)), hardware="cpu:24GB", task="full", context=64)


def test_replicas_join_and_train_together() -> None:
    found = plan("20b", hardware="2xH100", objective="throughput", task="lora")
    assert found.ranks == 1
    assert "init_distributed()" in found.code
    assert "DistributedDataParallel(model)" in found.code
    assert "DistributedDataParallel" not in plan("20b", hardware="2xH100", objective="throughput").code
    compile(found.code, "code", "exec")


def test_nodes_of_one_device_each_hold_the_model_if_it_fits() -> None:
    assert plan("20b", hardware="2x(1xH100)").ranks == 1
    assert plan("120b", hardware="2x(1x40GB)").ranks == 2


def test_nodes_that_share_a_model_place_experts_across_them() -> None:
    found = plan("120b", hardware="4x(2x24GB)")
    assert (found.fits, found.ranks) == (True, 8)
    axes = {wrapper.name: wrapper.axis for wrapper in found.stack if wrapper.name in (TENSOR, EXPERTS)}
    assert axes == {TENSOR: Axis("tp", 2), EXPERTS: Axis("ep", 4)}
    assert "all that crosses the network" in found.reasons[EXPERTS]
    assert "inside its node of 2" in found.reasons[TENSOR]
    assert Stack.from_json(found.to_dict()["stack"]) == found.stack
    assert "shard_experts(mesh=(('ep', 4), ('tp', 2)))" in found.code
    compile(found.code, "code", "exec")


def test_two_axes_fit_where_one_does_not() -> None:
    # Sixteen ranks cannot share eight key heads: over one axis attention is whole on each.
    machine = described("2x(8x7GB)")
    needed = {tuple(way.held.axes): way for way in options(target_of("120b"), machine, Workload())}
    assert needed["ep", "tp"].memory.num_bytes < machine.device.usable < needed["tp",].memory.num_bytes
    assert needed["ep", "tp"].speed["prefill"].tokens_per_second > needed["tp",].speed["prefill"].tokens_per_second
    assert plan("120b", hardware=machine).stack == needed["ep", "tp"].stack


def test_old_cards_are_said_to_be_slow() -> None:
    assert any("compute capability 8.0" in one for one in plan("20b", hardware="1xV100-32GB").warnings)
    assert not any("compute capability" in one for one in plan("20b", hardware="1xL4").warnings)
    assert not any("V100" in one for one in plan("20b", hardware="4x24GB", task="full", batch=4).to_fit)


def test_two_changes_are_offered_where_one_is_not_enough() -> None:
    found = plan("120b", hardware="1x24GB", task="full")
    assert found.to_fit
    assert "8 devices" in found.to_fit[0]


@pytest.mark.parametrize(
    ("hardware", "name", "said"),
    [
        ("3xH100", EXPERTS, "cannot share 8 key heads"),
        ("2xH100", EXPERTS, "slices of each expert are wide enough"),
        ("8xH100", EXPERTS, "from 4 devices on"),
    ],
)
def test_reasons_are_true(hardware: str, name: str, said: str) -> None:
    assert said in plan("20b", hardware=hardware).reasons[name]


def test_rows_that_cannot_be_packed_are_the_reason() -> None:
    config = GptOssConfig(num_hidden_layers=2, num_local_experts=4, hidden_size=80, intermediate_size=48)
    assert "multiple of 32" in plan(config, hardware="cpu:24GB").reasons[PACKED]


def test_values_are_as_wide_as_the_model_has_them() -> None:
    wide, half = (plan(tiny_model(kind), hardware="cpu:24GB", context=64) for kind in (torch.float32, torch.bfloat16))
    assert sum(wide.memory.cache.values()) == 2 * sum(half.memory.cache.values())
    assert wide.memory.activations == 2 * half.memory.activations


def test_names_of_any_script(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "\N{GRINNING FACE} d\u00e9j\u00e0")
    scope: dict[str, Any] = {}
    exec(plan(folder, hardware="cpu:24GB", context=64).code, scope)
    assert len(stack_of(scope["model"]))


def test_optimize_takes_what_plan_takes(path: Path) -> None:
    assert optimize(path, hardware="cpu:24GB", context=64).plan.fits
    with pytest.raises(PlanError, match="a config has no weights"):
        optimize(GptOssConfig(num_hidden_layers=2, num_local_experts=4), context=64)


@pytest.mark.parametrize(
    "hardware", [5, ["1xH100"], "9" * 400 + "GB", "9" * 5000 + "xH100", "2x(2x(2xL4))", "", "1xH100" * 99]
)
def test_machines_that_are_none(hardware: Any) -> None:
    with pytest.raises(HardwareError) as error:
        plan("20b", hardware=hardware)
    assert len(str(error.value)) < 2000


def test_models_that_are_none() -> None:
    with pytest.raises(CompatibilityError, match="GPT-OSS"):
        plan(torch.nn.Linear(2, 2), hardware="cpu:24GB")
    with pytest.raises(CompatibilityError, match="gpt_oss"):
        plan(LlamaConfig(), hardware="cpu:24GB")
    with pytest.raises(ValueError, match="too large"):
        plan("20b", hardware="cpu:24GB", context=10**400)

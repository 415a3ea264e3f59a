"""`bench`: what it measures, what it refuses to time, and what it says where something cannot be measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from gptoss_opt import (
    Benchmark,
    CheckpointError,
    CompatibilityError,
    PlanError,
    Stack,
    bench,
    compose,
    load,
    plan,
    shard_tensor_parallel,
    with_fast_experts,
    with_flash_attention,
    with_mxfp4_experts,
)
from gptoss_opt.apart import ProcessDied
from gptoss_opt.benchmarking.contender import Contender, Turn
from gptoss_opt.benchmarking.limits import limits_of
from gptoss_opt.model import attention as attention_module
from gptoss_opt.planner import Hardware, described
from gptoss_opt.planner.target import target_of
from gptoss_opt.testing import random_checkpoint
from tests.benchmarking.here import Here, here  # noqa: F401

SHORT: dict[str, Any] = {"prompt": 24, "new_tokens": 4, "repeats": 2}
STACK = compose(with_flash_attention(), with_mxfp4_experts())
# The name is the function's in the package.
MODULE = sys.modules["gptoss_opt.benchmarking.bench"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(random_checkpoint(tmp_path_factory.mktemp("bench") / "tiny"))


def on(hardware: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is another one."""
    monkeypatch.setattr(MODULE, "detected", lambda: hardware)


def of_memory(num_bytes: int) -> Hardware:
    """A CPU of which a process can have so many bytes."""
    device = described("cpu:1GB").device
    return Hardware(replace(device, memory=-(-num_bytes * device.memory // device.usable)))


@pytest.mark.usefixtures("here")
def test_figures(path: str) -> None:
    found = bench(path, STACK, **SHORT)
    assert found.right, found
    assert found.stack == STACK
    for one in (found.ours, found.theirs):
        assert one.absent is None
        assert one.loaded is not None
        assert one.loaded.seconds > 0
        assert len(one.turns) == SHORT["repeats"]
        assert one.rates["decode"] == 1 / median(turn.token for turn in one.turns) > 0
        assert one.rates["prefill"] == SHORT["prompt"] / median(turn.prompt for turn in one.turns) > 0
        assert one.shares["decode"] == pytest.approx(one.rates["decode"] / one.limits["decode"].tokens_per_second)
    pairs = list(zip(found.ours.turns, found.theirs.turns, strict=True))
    assert found.ratios["decode"] == median(theirs.token / ours.token for ours, theirs in pairs)
    assert found.ratios["prefill"] == median(theirs.prompt / ours.prompt for ours, theirs in pairs)
    # In bfloat16 rounding is seen, and is not taken for another prompt.
    assert found.agreement is not None
    assert 0 < found.agreement.off < found.agreement.allowed
    # Of packed experts less is read: more tokens a second are possible.
    assert found.ours.limits["decode"].tokens_per_second > found.theirs.limits["decode"].tokens_per_second
    shown = json.loads(json.dumps(found.to_dict()))
    assert shown["ratios"] == found.ratios
    assert Stack.from_json(shown["stack"]) == STACK
    for text in (str(found), found._repr_html_()):
        assert found.verdict in text
        assert "decoding, tokens/s" in text
        assert "with_mxfp4_experts()" in text
    assert "times as fast as transformers" in found.verdict


@pytest.mark.usefixtures("here")
def test_turns_alternate(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real = Contender.turn

    def noted(contender: Contender) -> Turn:
        order.append(contender.model.config._attn_implementation)
        return real(contender)

    monkeypatch.setattr(Contender, "turn", noted)
    ours, theirs = order_of = "gptoss_opt:torch", "eager"
    assert bench(path, with_flash_attention(backend="torch"), **SHORT).right
    # The first of each does not count.
    assert order == [ours, theirs, *order_of, *order_of]


def dropped_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    real = attention_module.attention

    def broken(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, **options: Any) -> Tensor:
        return real(q, k, v, sinks=torch.full_like(sinks, -1e4), **options)

    monkeypatch.setattr(attention_module, "attention", broken)


def other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        model = load(*args, **options)
        for layer in model.model.layers:
            layer.mlp.experts.down_proj_bias.data.add_(1)
        return model

    monkeypatch.setattr(MODULE, "load", broken)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("plant", "part_is_wrong", "said"),
    [(dropped_sinks, True, "attention by torch"), (other_weights, False, "on the same prompt our logits are")],
)
def test_what_is_wrong_is_not_timed(
    plant: Callable[[pytest.MonkeyPatch], None],
    part_is_wrong: bool,
    said: str,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    found = bench(path, with_flash_attention(backend="torch"), **SHORT)
    assert not found.right
    assert found.verdict.startswith("WRONG, so that nothing was timed: ")
    assert said in found.verdict
    # Weights that are wrong are the same weights in plain computations: only transformers has others.
    assert found.verification is not None
    assert found.verification.right is not part_is_wrong
    for one in (found.ours, found.theirs):
        assert one.turns == ()
        assert one.rates == {}
    assert found.ratios == {}
    json.dumps(found.to_dict())


@pytest.mark.usefixtures("here")
def test_transformers_does_not_fit(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The plan of a machine as small as that maps weights from the files.
    needed = plan(path, hardware="cpu:24GB", context=29).peak_bytes
    on(of_memory(needed + 1000), monkeypatch)
    found = bench(path, **SHORT)
    assert found.right
    assert found.theirs.absent == "does not fit: 0.0 GB beside ours, of 0.1 GB"
    assert found.agreement is None
    assert (found.theirs.loaded, found.theirs.turns, found.ratios) == (None, (), {})
    assert found.ours.rates["decode"] > 0
    assert "does not fit: 0.0 GB" in str(found.table)
    assert "times as fast" not in found.verdict
    assert found.to_dict()["transformers"]["absent"] == found.theirs.absent
    on(of_memory(needed - 1000), monkeypatch)
    with pytest.raises(PlanError, match="It does not fit: 0.1 GB are needed.* To make it fit: "):
        bench(path, **SHORT)
    with pytest.raises(PlanError, match=r"compose\(.*\) does not fit: 0.1 of 0.1 GB. Leave it out for the plan's."):
        bench(path, with_fast_experts(), **SHORT)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("error", "said", "first"),
    [(ProcessDied("killed by SIGKILL"), "killed by SIGKILL", True), (MemoryError(), "ran out of memory", False)],
)
def test_who_dies_is_said(error: Exception, said: str, first: bool, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(name: str) -> Benchmark:
        real = Here.ask

        def ask(self: Here, question: Any) -> Any:
            answer = real(self, question)
            # When the model is first there, or in its first turn that counts.
            if self.answers.model.config._attn_implementation.startswith(name) and (
                first or question is Contender.turn
            ):
                raise error
            return answer

        with monkeypatch.context() as patch:
            patch.setattr(Here, "ask", ask)
            return bench(path, with_flash_attention(), **SHORT)

    found = dies("eager")
    assert found.right
    assert found.theirs.absent == said
    assert len(found.ours.turns) == SHORT["repeats"]
    assert found.ratios == {}
    found = dies("gptoss_opt")
    assert not found.right
    assert found.verdict == f"Not measured: ours {said}."


@pytest.mark.usefixtures("here")
def test_other_errors_are_raised(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(contender: Contender) -> Any:
        raise RuntimeError("the sizes differ")

    monkeypatch.setattr(Contender, "turn", broken)
    with pytest.raises(RuntimeError, match="the sizes differ"):
        bench(path, with_flash_attention(), **SHORT)


def test_the_limit_is_bytes_over_bandwidth_and_operations_over_rate(path: str) -> None:
    target, hardware = target_of(path), described("cpu:24GB")
    config, held = target.config, target.held(compose())
    experts = held.weights["experts"]
    met = experts * config.num_experts_per_tok / config.num_local_experts
    # The prompt and half of what is decoded, or half of the window.
    keys = 4 * config.num_key_value_heads * config.head_dim * (42 + config.sliding_window / 2)
    read = held.num_bytes - config.vocab_size * config.hidden_size * 2 - experts + met + keys
    found = limits_of(config, held, hardware, prompt=40, new_tokens=4)
    assert found["decode"].bound == "memory bandwidth"
    assert found["decode"].tokens_per_second == pytest.approx(hardware.device.bandwidth / read, rel=1e-3)
    # Twice as fast a device allows twice as much, however long starting kernels takes.
    fast = replace(hardware.device, flops=2 * hardware.device.flops, bandwidth=2 * hardware.device.bandwidth)
    twice = limits_of(config, held, Hardware(fast), prompt=40, new_tokens=4)
    for what, limit in found.items():
        assert twice[what].tokens_per_second == pytest.approx(2 * limit.tokens_per_second, rel=1e-3)
    long = limits_of(config, held, hardware, prompt=4000, new_tokens=4)
    assert long["prefill"].bound == "products"


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"prompt": 0}, ValueError, "prompt is 0. Give a whole number from 1 up."),
        ({"repeats": 1.5}, ValueError, "repeats is 1.5"),
        ({"new_tokens": 131_072}, ValueError, "make 131,585 tokens, of 131,072 that the model takes"),
        ({"stack": shard_tensor_parallel(degree=2)}, ValueError, "shard_tensor_parallel takes several"),
        ({"source": "nowhere/nothing"}, CheckpointError, "nowhere/nothing: there is no such folder"),
        ({"source": torch.nn.Linear(1, 1)}, TypeError, "given a Linear.* save_pretrained writes one"),
    ],
)
def test_mistakes(given: dict[str, Any], error: type[Exception], said: str, path: str) -> None:
    with pytest.raises(error, match=said):
        bench(**{"source": path, **given})


def test_wrappers_that_do_not_suit_the_model(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "tiny")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"attention_dropout": 0.0', '"attention_dropout": 0.5'))
    with pytest.raises(CompatibilityError, match="attention_dropout is 0.5"):
        bench(folder, with_flash_attention(), **SHORT)

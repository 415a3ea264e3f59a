"""The demo: it measures, compares and judges, and its errors are one sentence."""

from __future__ import annotations

import mmap
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoss_opt import ContinuousBatcher, cli, demo, load, with_flash_attention
from gptoss_opt.apart import ProcessDied
from gptoss_opt.benchmarking.peak import PeakMemory
from gptoss_opt.demo import DemoError, finetuning, measure, run_demo, serving
from gptoss_opt.demo.comparison import Case, Column, Comparison, DemoReport, Outcome, Settings, Step
from gptoss_opt.demo.measure import compare
from gptoss_opt.demo.tables import EXPERTS, FINETUNING, SERVING, SHARDED, STACKS, WIDE
from gptoss_opt.testing import random_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SHORT = replace(STACKS, cases=STACKS.cases[:1])


def stacks(*cases: Case) -> tuple[Comparison, ...]:
    """All comparisons, the first with these cases."""
    return (replace(STACKS, cases=cases), EXPERTS, SERVING)


def figures(report: DemoReport, heading: str) -> list[dict[str, Any]]:
    """The figures of the comparison that has this column."""
    (found,) = (one for one in report.comparisons if heading in [column.heading for column in one.columns])
    return [outcome.figures for outcome in found.outcomes]


def small_run(**changes: Any) -> DemoReport:
    """The demo within the process of the tests, on a tiny checkpoint."""
    settings = {"size": "tiny", "wide": None, "lengths": [24, 8], "new_tokens": 4, "isolated": False}
    return run_demo(**{**settings, **changes})


def without_sinks(model: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-1e4)
    return model


def load_with_other_biases(*args: Any, **options: Any) -> Any:
    """`load`, but the last bias of the experts is off."""
    model = load(*args, **options)
    for layer in model.model.layers:
        layer.mlp.experts.down_proj_bias.data.add_(1)
    return model


def load_with_other_gradients(*args: Any, **options: Any) -> Any:
    """`load`, but routers and adapters go uphill."""
    model = load(*args, **options)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("router" in name or "lora_" in name):
            parameter.register_hook(torch.neg)
    return model


def load_with_a_frozen_norm(*args: Any, **options: Any) -> Any:
    """`load`, but one parameter is not trained."""
    model = load(*args, **options)
    model.model.norm.weight.requires_grad_(False)
    return model


class Forgetful(ContinuousBatcher):
    """A batcher that takes the last token of each prompt for another."""

    def submit(self, prompt: Any, *args: Any, **options: Any) -> Any:
        return super().submit([*prompt[:-1], 0], *args, **options)


def process_of(cases: Sequence[Case], settings: Settings) -> Iterator[Step]:
    for case in cases:
        yield f"{case.label}: no work"
        yield None
        yield Outcome(dict.fromkeys((column.heading for column in STACKS.columns), os.getpid()))


def is_killed(cases: Sequence[Case], settings: Settings) -> Iterator[Step]:
    yield f"{cases[0].label}: no work"
    os.kill(os.getpid(), signal.SIGKILL)


def frozen_sinks(model: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn.sinks.requires_grad_(False)
    return model


def test_sharded_over_two_processes() -> None:
    assert SHARDED.cases[-1].label == "both"
    report = small_run(lengths=[8], comparisons=[SHORT, replace(SHARDED, cases=SHARDED.cases[::3])], ranks=2)
    assert report.problems == ()
    one, *sharded = figures(report, "held by")
    assert [line["held by"] for line in sharded] == ["both, 2 ranks"]
    for line in sharded:
        assert line["same greedy tokens"] == (5, 5)
        assert line["parameters of a rank"] < 0.75 * one["parameters of a rank"]
        assert line["decode"] > 0
    assert re.search(r"one process  .* MiB \(100%\)  ", str(report))
    assert re.search(r"both, 2 ranks  yes .* MiB \(\d\d%\)  ", str(report))


def test_ranks_that_do_not_divide_the_heads() -> None:
    with pytest.raises(DemoError, match="the 2 key/value heads of .* do not divide over 3 ranks"):
        small_run(ranks=3)


def test_every_stack_at_every_length_gives_the_same_model() -> None:
    report = small_run()
    rows = report.comparisons[0].table.rows
    assert [row[:2] for row in rows] == [[str(n), case.label] for n in (8, 24) for case in STACKS.cases]
    assert [row[2] for row in rows] == ["-", "yes", "-", "yes"]
    assert report.problems == ()
    assert [line["experts"] for line in figures(report, "experts")] == [case.label for case in EXPERTS.cases]
    lines = figures(report, "stack")
    assert len(lines) == 4
    for line in lines:
        assert line["same greedy tokens"] == (4, 4)
        assert line["generate"] > 0
        assert line["train step"] > 0
        assert line["max logit diff"] < 1e-4
        assert line["sink grad diff"] is not None
        assert line["sink grad diff"] < 1e-4


def test_experts_are_measured_in_each_way_they_are_held() -> None:
    lines = figures(small_run(dtype="float32", lengths=[8]), "experts")
    for line in lines:
        assert line["same greedy tokens"] == (5, 5)
        assert line["max logit diff"] < 1e-4
        assert line["load"] > 0
        assert line["decode"] > 0
    # Two layers of four experts: three matrices of 64 x 96 each, in 32 and in 4.25 bits.
    dense, fast, packed = (line["expert weights"] for line in lines)
    assert dense == fast == 2 * 4 * 3 * 64 * 96 * 4 / 2**20
    assert packed == dense * 4.25 / 32


def test_experts_that_compute_something_else_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "load", load_with_other_biases)
    for dtype in ("float32", "bfloat16"):
        report = small_run(comparisons=[SHORT, EXPERTS, SERVING], lengths=[8], dtype=dtype)
        for case in EXPERTS.cases[1:]:
            assert any(problem.startswith(f"{case.label}: the median") for problem in report.problems)
        assert f"NOT THE SAME: {report.problems[0]}" in str(report)


@pytest.mark.parametrize("new_tokens", [1, 5])
def test_prompts_are_served_in_each_way(new_tokens: int) -> None:
    report = small_run(dtype="float32", comparisons=[SHORT, SERVING], lengths=[8], new_tokens=new_tokens)
    assert report.problems == ()
    lines = figures(report, "served by")
    assert [line["served by"] for line in lines] == [case.label for case in SERVING.cases]
    static, *served = lines
    for line in lines:
        assert line["same greedy tokens"] == (sum(serving.token_limits(new_tokens)),) * 2
        assert line["max logit diff"] < 1e-4
        assert line["speed"] > 0
    # Two layers of 2 x 2 heads of 16; the sliding one of generate holds 7 tokens, the other all of each row.
    longest = max(map(len, serving.random_prompts(256, seed=0)))
    assert static["keys and values"] == 8 * (longest + new_tokens + 7) * 2 * 2 * 16 * 4 / 2**10
    assert static["first token"] is None
    for line in served:
        assert line["first token"] is not None
        assert line["first token"] > 0
        assert 0 < line["keys and values"] < static["keys and values"]


def test_prompts_to_serve_have_many_lengths_and_the_same_ones_again() -> None:
    prompts, others = (serving.random_prompts(256, seed) for seed in (0, 1))
    assert prompts == serving.random_prompts(256, seed=0)
    assert [*map(len, prompts)] == [*map(len, others)]
    assert all(prompt[:4] != other[:4] for prompt, other in zip(prompts, others, strict=True))
    assert 8 <= min(map(len, prompts)) < 30 < 90 < max(map(len, prompts)) <= 120
    assert 8 <= min(serving.token_limits(16)) < 12 < max(serving.token_limits(16)) == 17
    assert serving.token_limits(1) == [2] * 8


def test_a_batcher_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "ContinuousBatcher", Forgetful)
    for dtype in ("float32", "bfloat16"):
        report = small_run(comparisons=[SHORT, SERVING], lengths=[8], dtype=dtype)
        for case in SERVING.cases[1:]:
            problems = [problem for problem in report.problems if problem.startswith(f"{case.label}: ")]
            assert any("the median" in problem for problem in problems)
            assert (f"{case.label}: the greedy tokens differ." in problems) == (dtype == "float32")
        assert re.search(r"ContinuousBatcher  +\d+ of \d\d  ", str(report))


def test_the_bar_tells_how_fast_a_batcher_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving, "INTERVAL", 0)
    small_run(comparisons=[SHORT, SERVING], lengths=[8])
    shown = capsys.readouterr().err
    for case in SERVING.cases[1:]:
        assert re.search(rf"{case.label}: [1-9]\d* tokens/s", shown)
    assert "| 5/5 " in shown


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_fine_tuning_in_each_way(dtype: str | None) -> None:
    report = small_run(comparisons=[FINETUNING], dtype=dtype)
    assert report.problems == ()
    lines = figures(report, "fine-tuning")
    assert [line["fine-tuning"] for line in lines] == [case.label for case in FINETUNING.cases]
    plain, full, peft, lora = lines
    for line in lines:
        assert line["first loss"] == pytest.approx(plain["first loss"], rel=2e-3 if dtype else 1e-5)
        assert line["last loss"] < line["first loss"]
        assert line["speed"] > 0
    if not dtype:
        assert full["last loss"] == pytest.approx(plain["last loss"], rel=1e-5)
    # Rows and columns of 2 x 4 matrices of attention, and of 2 x 2 for each of four experts.
    pairs = 2 * (2 * (64 + 64) + 2 * (64 + 32)) + 2 * 4 * ((64 + 192) + (96 + 64))
    assert peft["trained parameters"] == lora["trained parameters"] == 8 * pairs
    assert plain["trained parameters"] == full["trained parameters"] == 208_080
    text = str(report)
    assert f"dtype {dtype or 'float32'}, 3 steps of AdamW on a row of 768 tokens" in text
    assert "GptOssForCausalLM: 4 wrappers" in text


def test_fine_tuning_of_another_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "load", load_with_other_biases)
    report = small_run(comparisons=[FINETUNING], lengths=[8])
    for case in FINETUNING.cases[1::2]:
        assert any(problem.startswith(f"{case.label}: the loss of the first step") for problem in report.problems)


def test_other_gradients_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "load", load_with_other_gradients)
    report = small_run(comparisons=[FINETUNING], lengths=[8])
    full, lora = report.problems
    assert full.startswith("with_full_finetuning: the loss of a later step is off by ")
    assert lora.startswith("with_lora, with_mxfp4_experts: the loss does not fall: ")


def test_parameters_that_are_not_trained_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "load", load_with_a_frozen_norm)
    report = small_run(comparisons=[FINETUNING], lengths=[8])
    assert "with_full_finetuning: it trains 208,016 parameters, not 208,080." in report.problems


def test_what_is_judged_of_losses() -> None:
    losses = torch.tensor([4.0, 3.0, 2.0])

    def problems(losses: torch.Tensor, count: int = 8, adapters: bool = False, bits: int = 32) -> list[str]:
        first = torch.tensor([4.0, 3.0, 2.0]), 8, False
        return finetuning.judge(first, (losses, count, adapters), {16: torch.bfloat16, 32: torch.float32}[bits])

    assert problems(losses) == problems(losses + 1e-6) == problems(losses, 2, adapters=True) == []
    assert problems(losses, 7) == ["it trains 7 parameters, not 8."]
    later = torch.tensor([4.0, 3.0, 2.01])
    assert problems(later) == ["the loss of a later step is off by 5.0e-03, above 1e-04."]
    assert problems(later, 2, adapters=True) == []
    assert problems(losses + 0.1, 2, adapters=True) == ["the loss of the first step is off by 2.5e-02, above 1e-05."]
    assert problems(later, bits=16) == []
    assert len(problems(losses + 0.1, bits=16)) == 2
    assert len(problems(losses[:1].expand(3), 2, adapters=True)) == 1
    assert len(problems(losses * torch.nan)) == 3


def test_fine_tuning_that_cannot_be_measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetuning, "find_spec", lambda name: None)
    report = small_run(comparisons=[replace(FINETUNING, cases=FINETUNING.cases[::2])], lengths=[8])
    assert report.problems == ()
    assert re.search(r"LoRA \(transformers and peft\): peft is not installed  n/a +n/a +n/a +n/a +n/a\n", str(report))
    # Gradients and two values of AdamW, in float32.
    monkeypatch.setattr(finetuning, "_free_memory", lambda device: 3 * 208_080 * 4)
    report = small_run(comparisons=[replace(FINETUNING, cases=FINETUNING.cases[::3])], lengths=[8])
    plain, lora = figures(report, "fine-tuning")
    assert plain["fine-tuning"] == "all parameters (transformers): needs 0.0 GiB beside the model"
    assert plain["speed"] is None
    assert lora["speed"] > 0
    assert report.problems == ()


def test_a_step_that_runs_out_of_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("gptoss_opt.serve.runner.Runner.forward", fail)
    with pytest.raises(DemoError, match="out of memory, or killed"):
        small_run(comparisons=[SHORT, SERVING], lengths=[8])


def test_the_wide_checkpoint_has_experts_as_large_as_those_of_20b() -> None:
    assert (WIDE.hidden, WIDE.intermediate, WIDE.experts_per_token) == (2880, 2880, 4)
    comparisons = (STACKS, replace(EXPERTS, cases=EXPERTS.cases[::2]), SERVING)
    report = small_run(lengths=[8], wide=replace(WIDE, hidden=64, intermediate=64), comparisons=comparisons)
    assert report.problems == ()
    assert figures(report, "experts")[1]["expert weights"] == 8 * 3 * 64 * 64 * 17 / 32 / 2**20
    assert "one layer as wide" not in str(report)


def test_what_is_not_packed_in_the_file_is_not_packed(tmp_path: Path) -> None:
    dense = load(random_checkpoint(tmp_path / "packed"))
    dense.save_pretrained(tmp_path / "dense")
    report = small_run(model=str(tmp_path / "dense"), lengths=[8])
    assert [line["experts"] for line in figures(report, "experts")] == [case.label for case in EXPERTS.cases[:2]]
    assert [line["served by"] for line in figures(report, "served by")] == [case.label for case in SERVING.cases[:2]]
    tuned = [line["fine-tuning"] for line in figures(report, "fine-tuning")]
    assert tuned == [case.label for case in FINETUNING.cases[:3]]
    assert report.problems == ()


def test_what_it_prints() -> None:
    text = str(small_run())
    for expected in (
        "random checkpoint, size 'tiny', dtype float32, 4 new tokens",
        "length  stack                 same greedy tokens  max logit diff  sink grad diff",
        "8       eager (transformers)  -                   -               -",
        "24      with_flash_attention  yes",
        "Peak memory: the most that both took beyond the\nloaded model",
        "GptOssForCausalLM: 1 wrapper",
        "random checkpoint, size 'tiny', dtype bfloat16, 4 tokens after 64",
        "experts               same greedy tokens  max logit diff  load",
        "dense (transformers)  -                   -               ",
        "random checkpoint, size 'tiny', dtype bfloat16, 8 prompts of 8 to 120 tokens",
        "served by                              same greedy tokens  max logit diff  speed",
        "generate, one batch (transformers)     -                   -               ",
        "First token: the median; generate gives all at the end.",
        "4 expert weights packed as MXFP4, exactly",
    ):
        assert expected in text
    assert "The plan for this machine" in text
    code = text[text.rindex("from gptoss_opt import") :]
    assert '"openai/gpt-oss-20b"' in code
    compile(code, "demo", "exec")
    assert "NOT THE SAME" not in text


def test_cells_are_beside_those_of_the_first_row() -> None:
    def cells(column: Column, *values: float | None) -> list[str]:
        first, *others = (Outcome({column.heading: value}) for value in values)
        return [column.cell(outcome, first) for outcome in (first, *others)]

    assert cells(Column("x"), 1, 2) == ["1", "2"]
    assert cells(Column("x", "{:.1f} s".format, "less"), 3, 2, 3, None) == ["3.0 s", "2.0 s (1.5x)", "3.0 s", "n/a"]
    assert cells(Column("x", "{:.0f} MiB".format, "less"), 0, 2) == ["0 MiB", "2 MiB"]
    assert cells(Column("x", str, "more"), 2, 3) == ["2", "3 (1.5x)"]
    assert cells(Column("x", str, "share"), 4, 1, 4) == ["4 (100%)", "1 (25%)", "4 (100%)"]
    assert cells(Column("x", str, "first", missing="none"), None, 0.5, None) == ["-", "0.5", "none"]


def test_a_notebook_shows_html() -> None:
    report = small_run(comparisons=stacks(Case("a < b"), Case("no sinks", without_sinks)), lengths=[8])
    page = report._repr_html_()
    assert page.count("<table>") == len(report.comparisons) == 3
    assert "a &lt; b" in page
    assert "a < b" not in page
    assert "NOT THE SAME: no sinks at length 8: " in page


def test_models_with_the_same_wrapper_share_a_process_of_their_own() -> None:
    cases = (Case("a"), Case("b"), Case("c", with_flash_attention()))
    comparison = replace(STACKS, cases=cases, measure=process_of)
    report = small_run(comparisons=[comparison], isolated=True)
    a, b, c = (outcome.figures["generate"] for outcome in report.comparisons[0].outcomes)
    assert a == b
    assert len({a, c, os.getpid()}) == 3
    with pytest.raises(DemoError, match="out of memory, or killed"):
        small_run(comparisons=[replace(comparison, cases=cases[:1], measure=is_killed)], isolated=True)


def test_a_stack_that_changes_the_model_is_found() -> None:
    comparisons = stacks(Case("eager"), Case("no sinks", without_sinks))
    for dtype in ("float32", "bfloat16"):
        report = small_run(comparisons=comparisons, lengths=[24], dtype=dtype)
        assert any(problem.startswith("no sinks at length 24: the median") for problem in report.problems)
        assert f"NOT THE SAME: {report.problems[0]}" in str(report)


def test_16_bits_have_room_for_rounding() -> None:
    assert small_run(dtype="bfloat16").problems == ()


def test_frozen_sinks_are_not_judged_and_lost_gradients_are() -> None:
    report = small_run(comparisons=stacks(Case("eager"), Case("frozen", frozen_sinks)), lengths=[8])
    assert report.problems == ()
    assert "no gradient" in str(report)
    tokens, logits, sinks = torch.ones(2), torch.randn(300, 8), torch.randn(6)
    agreement = compare((tokens, logits, sinks), (tokens, logits, torch.zeros(6)))
    assert agreement.figures["sink grad diff"] == 1
    assert len(agreement.problems) == 1


def test_compare_sees_every_position_and_nan() -> None:
    first = (torch.tensor([1, 2, 3]), torch.randn(300, 8), torch.randn(6))
    same = {"same greedy tokens": (3, 3), "max logit diff": 0.0, "sink grad diff": 0.0}
    assert compare(first, first) == Outcome(same, problems=())
    logits = first[1].clone()
    logits[299, 7] += 1
    other = compare(first, (torch.tensor([1, 5, 3]), logits, first[2]))
    assert other.figures["same greedy tokens"] == (1, 3)
    assert other.figures["max logit diff"] == pytest.approx(1, rel=1e-3)
    assert [problem.split()[:2] for problem in other.problems] == [["the", "greedy"], ["max", "logit"]]
    assert len(compare(first, (first[0], logits * torch.nan, first[2])).problems) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_sees_what_is_freed_again() -> None:
    memory = PeakMemory(torch.device("cpu"))
    memory.reset()
    # Straight from the kernel: the allocator may have pages left over from other tests, which are resident already.
    with mmap.mmap(-1, 2**26) as block:
        for page in range(0, 2**26, mmap.PAGESIZE):
            block[page] = 1
    peak = memory.peak()
    assert peak is not None
    assert 60 << 20 < peak < 80 << 20
    memory.reset()
    after = memory.peak()
    assert after is not None
    assert after < 10 << 20


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given: list[Any] = []

    def run(model: str | None, **options: Any) -> DemoReport:
        given.append((model, options))
        return small_run(model=model, comparisons=comparisons, **options)

    monkeypatch.setattr(demo, "run_demo", run)
    path = str(random_checkpoint(tmp_path / "checkpoint"))
    comparisons = stacks(*STACKS.cases)
    arguments = ["demo", "--model", path, "--lengths", "8", "12", "--new-tokens", "3", "--dtype", "float32"]
    assert cli.main(arguments) == 0
    assert given == [(path, {"lengths": [8, 12], "new_tokens": 3, "dtype": "float32"})]
    out = capsys.readouterr().out
    assert f'"{path}"' in out
    assert "The plan for this machine" in out
    assert "It fits" in out
    comparisons = stacks(Case("eager"), Case("no sinks", without_sinks))
    assert cli.main(arguments) == 1
    assert "NOT THE SAME" in capsys.readouterr().out


@pytest.mark.parametrize("lengths", [["1"], ["0"], ["-3"], ["many"], ["8", "2.5"], []])
def test_bad_lengths_are_argument_errors(lengths: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--lengths", *lengths]) == 2
    assert "argument --lengths" in capsys.readouterr().err


def test_models_it_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    short = random_checkpoint(tmp_path / "short")
    for model, sentence in {
        str(tmp_path / "missing"): ".*missing: there is no such folder",
        str(tmp_path / "llama"): ".*llama/config.json: model_type is 'llama'. Give a checkpoint of a gpt_oss model.",
        str(short): "'.*short' takes 131072 tokens at most, not 200000.",
    }.items():
        with pytest.raises(DemoError, match=sentence):
            run_demo(model, lengths=[200_000], isolated=False)
        assert cli.main(["demo", "--model", model, "--lengths", "200000"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("gptoss_opt demo: ")
        assert error.count("\n") == 1
    with pytest.raises(DemoError, match="config.json: a file. Give the folder"):
        run_demo(str(short / "config.json"), isolated=False)
    with pytest.raises(ValueError, match="at least one length and one row"):
        run_demo(lengths=[])
    shard = next(short.glob("*-00002-*"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DemoError, match=f"{shard.name}: the header says"):
        small_run(model=str(short))
    next(short.glob("*-00001-*")).unlink()
    with pytest.raises(DemoError, match="model-00001-of-.*: missing"):
        small_run(model=str(short))


@pytest.mark.parametrize("error", [ProcessDied(), MemoryError(), torch.OutOfMemoryError()])
def test_out_of_memory_is_said(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr("gptoss_opt.demo.stacks.verify", fail)
    with pytest.raises(DemoError, match="out of memory, or killed: use shorter --lengths or a smaller model."):
        small_run()


def test_a_wrapper_that_refuses_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = random_checkpoint(tmp_path / "checkpoint")
    config = path / "config.json"
    config.write_text(config.read_text().replace('"attention_dropout": 0.0', '"attention_dropout": 0.5'))
    comparisons = stacks(Case("x", with_flash_attention()))
    monkeypatch.setattr(demo, "run_demo", lambda model: small_run(model=model, comparisons=comparisons))
    assert cli.main(["demo", "--model", str(path)]) == 2

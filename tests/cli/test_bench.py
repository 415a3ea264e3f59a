"""`gptoss-opt bench`: as a person uses it, with processes of their own, and what stops it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest

from gptoss_opt import cli
from gptoss_opt.testing import random_checkpoint
from tests.benchmarking.here import here  # noqa: F401

SHORT = ["--prompt", "16", "--new-tokens", "3", "--repeats", "1"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(random_checkpoint(tmp_path_factory.mktemp("bench") / "tiny"))


def test_json(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    # In processes of their own.
    assert cli.main(["bench", path, *SHORT, "--json"]) == 0
    streams = capsys.readouterr()
    found = json.loads(streams.out)
    assert found["right"] is True
    for name in ("ours", "transformers"):
        assert found[name]["absent"] is None
        assert found[name]["tokens_per_second"]["decode"] > 0
        assert found[name]["seconds_to_load"] > 0
        # Whole processes: what they had imported before is not counted.
        assert found[name]["peak_bytes"] < 200e6
    assert "transformers: turn 1" in streams.err


@pytest.mark.usefixtures("here")
def test_the_table(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", path, *SHORT, "--wrapper", "with_flash_attention"]) == 0
    out = capsys.readouterr().out
    for part in ("Right: ", "decoding, tokens/s", "of the limit by", "peak memory", "with_flash_attention()"):
        assert part in out
    assert "with_mxfp4_experts()" not in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("wrappers", [[], ["with_flash_attention"], ["with_mxfp4_experts", "with_flash_attention"]])
def test_the_code_runs(wrappers: list[str], path: str, capsys: pytest.CaptureFixture[str]) -> None:
    named = [word for name in wrappers for word in ("--wrapper", name)]
    assert cli.main(["bench", path, *SHORT, *named, "--show-code"]) == 0
    code = capsys.readouterr().out
    exec(code, {})
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith("Right: ")
    assert all(f"{name}()" in out for name in wrappers)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--wrapper", "with_wings"], "there is no wrapper 'with_wings'. Known are with_chunked_loss, "),
        (["--wrapper", "shard_experts"], "there is no wrapper 'shard_experts'"),
        (["--wrapper", "with_wings", "--show-code"], "there is no wrapper 'with_wings'"),
        (["--prompt", "200000"], "of 131,072 that the model takes"),
        (["--wrapper", "with_lora", "--wrapper", "with_full_finetuning"], "cannot apply this stack"),
    ],
)
def test_mistakes(arguments: list[str], said: str, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", path, *arguments]) == 2
    streams = capsys.readouterr()
    assert said in streams.err
    assert streams.err.startswith("gptoss-opt: ")
    assert streams.err.count("\n") == 1
    assert not streams.out


def test_no_such_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "nowhere/nothing"]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert cli.main(["bench", "20b", "--repeats", "0"]) == 2


@pytest.mark.usefixtures("here")
def test_what_is_wrong_exits_with_1(
    path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptoss_opt.benchmarking.report.Agreement.right", False)
    assert cli.main(["bench", path, *SHORT]) == 1
    assert "WRONG, so that nothing was timed" in capsys.readouterr().out


def test_ctrl_c_is_clean_and_ends_processes(path: str) -> None:
    command = [sys.executable, "-m", "gptoss_opt", "bench", path, "--new-tokens", "10000"]

    def heard() -> None:  # whatever this process does with it: in the background of a shell it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, preexec_fn=heard, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            end = time.monotonic() + 120
            while not (children := psutil.Process(process.pid).children()) and time.monotonic() < end:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            out, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert not out
    assert b"Traceback" not in error
    assert children
    assert not psutil.wait_procs(children, timeout=10)[1]

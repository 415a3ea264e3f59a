"""`gptoss-opt run`: prompts from everywhere, streamed, with and without the chat template."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptoss_opt import cli
from gptoss_opt.testing import random_checkpoint
from tests.finetune import chats

PROMPTS = ["hello there", "what is it?", "2 + 2"]
SHORT = ["--max-new-tokens", "6", "--context", "128"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(chats.checkpoint(tmp_path_factory.mktemp("run") / "small"))


def rows(path: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    code = cli.main(["run", path, *arguments, *SHORT, "--json"])
    streams = capsys.readouterr()
    assert code == 0, streams.err
    return [json.loads(line) for line in streams.out.splitlines()]


def test_prompts_come_from_arguments_a_file_and_standard_input(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = rows(path, capsys, *PROMPTS)
    assert [row["prompt"] for row in found] == PROMPTS
    assert all(len(row["tokens"]) <= 6 and row["finish_reason"] for row in found)
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "", "  "]))
    assert rows(path, capsys, "--file", str(tmp_path / "prompts.txt")) == found
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(PROMPTS)))
    assert rows(path, capsys) == found
    # Without the template the same prompts are other tokens.
    assert [row["tokens"] for row in rows(path, capsys, *PROMPTS, "--raw")] != [row["tokens"] for row in found]


def test_text_is_written_as_it_comes(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = rows(path, capsys, PROMPTS[0])
    assert cli.main(["run", path, PROMPTS[0], *SHORT]) == 0
    assert capsys.readouterr().out == f"{row['text']}\n"
    assert cli.main(["run", path, *PROMPTS, *SHORT]) == 0
    out = capsys.readouterr().out
    assert all(f"> {prompt}\n" in out for prompt in PROMPTS)


@pytest.mark.parametrize("raw", [[], ["--raw"]])
def test_the_code_does_the_same(raw: list[str], path: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [row["text"] for row in rows(path, capsys, *PROMPTS, *raw)]
    assert cli.main(["run", path, *PROMPTS, *raw, *SHORT, "--show-code"]) == 0
    exec(capsys.readouterr().out, {})
    assert capsys.readouterr().out.splitlines() == "\n".join(texts).splitlines()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--file", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["hello", "--max-new-tokens", "200000"], "more than"),
        ([" "], "there is no prompt"),
    ],
)
def test_mistakes(arguments: list[str], said: str, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", path, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.splitlines()[-1].startswith("gptoss-opt: ")


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = random_checkpoint(tmp_path / "bare", chats.SIZE)
    assert cli.main(["run", str(folder), "hello"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_ctrl_c_is_clean(path: str) -> None:
    # Enough to do for it to be under way for a while.
    prompts = [f"{number} {PROMPTS[0]}" for number in range(400)]
    command = [sys.executable, "-m", "gptoss_opt", "run", path, *prompts, "--max-new-tokens", "2000", "--raw"]

    def heard() -> None:  # whatever this process does with it: in the background of a shell it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=heard, **pipes) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(1)
            process.send_signal(signal.SIGINT)
            out, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in error
    assert out.count("> ") < len(prompts)

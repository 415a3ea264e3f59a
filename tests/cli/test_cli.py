"""The command line, as a person and as a script use it."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gptoss_opt import cli, doctor, plan
from gptoss_opt.testing import random_checkpoint

COMMANDS = ("plan", "run", "verify", "bench", "doctor", "demo", "finetune", "serve")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(random_checkpoint(tmp_path_factory.mktemp("cli") / "tiny"))


def test_exit_codes(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "20b", "--hardware", "1xH100"]) == 0
    assert "It fits" in capsys.readouterr().out
    assert cli.main(["plan", "120b", "--hardware", "1xL4"]) == 1
    assert "To make it fit" in capsys.readouterr().out
    assert cli.main(["plan", "20b", "--hardware", "a toaster"]) == 2
    assert cli.main(["plan", str(Path(path) / "nothing")]) == 2
    assert cli.main(["plan", "20b", "--task", "dream"]) == 2
    assert cli.main(["dream"]) == 2
    assert cli.main(["verify", path]) == 0
    assert "Right: " in capsys.readouterr().out
    assert cli.main(["doctor"]) == 0
    assert cli.main(["--version"]) == 0


def test_mistakes_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "20b", "--hardware", "a toaster"]) == 2
    streams = capsys.readouterr()
    assert streams.err.startswith("gptoss-opt: 'a toaster': no card")
    assert streams.err.count("\n") == 1
    assert not streams.out


def test_json(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["plan", "20b", "--hardware", "2x24GB", "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(plan("20b", hardware="2x24GB").to_dict()))
    cli.main(["doctor", "--json"])
    assert json.loads(capsys.readouterr().out)["backends"] == doctor().backends
    cli.main(["verify", path, "--json"])
    assert json.loads(capsys.readouterr().out)["right"] is True


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["plan", "20b", "--hardware", "2x24GB", "--batch", "2"], "It fits"),
        (["doctor"], "Chosen here"),
        (["verify", "PATH", "--gradients"], "Right: "),
    ],
)
def test_the_code_that_is_shown_runs(
    arguments: list[str], answer: str, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [path if one == "PATH" else one for one in arguments]
    assert cli.main([*arguments, "--show-code"]) == 0
    code = capsys.readouterr().out
    exec(code, {})
    assert answer in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    assert "sage:" in capsys.readouterr().out


def run(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gptoss_opt", *arguments]


def test_nothing_is_coloured_when_piped() -> None:
    found = subprocess.run(run("plan", "20b", "--hardware", "1xH100"), capture_output=True, text=True, check=True)
    assert "\x1b[" not in found.stdout
    # Code is copied as it is; all else fits into 80 columns.
    prose = found.stdout.split("from gptoss_opt import")[0]
    assert max(map(len, prose.splitlines())) <= 80


def test_in_a_terminal() -> None:
    reader, writer = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm-256color"}
    process = subprocess.Popen(
        run("plan", "120b", "--hardware", "1xL4"), stdout=writer, stderr=writer, env=environment, close_fds=True
    )
    os.close(writer)
    shown = b""
    try:
        while chunk := os.read(reader, 65536):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 1
    text = shown.decode()
    assert "\x1b[1m" in text  # headings are bold
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).replace("\r", "")
    assert "It does not fit" in plain
    assert max(map(len, plain.split("from gptoss_opt import")[0].split("To make it fit")[0].splitlines())) <= 80


def test_doctor_says_why_not() -> None:
    found = doctor()
    assert set(found.backends) == {"attention", "packed experts", "dense experts"}
    assert all(reason for some in found.backends.values() for reason in some.values() if reason is not None)
    assert "torch" in found.facts
    assert "Chosen here" in str(found)
    assert "<table>" in found._repr_html_()

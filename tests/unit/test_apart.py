"""`Apart`: a process answers, raises here what went wrong there, and says how it died."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from gptoss_opt.apart import Apart, out_of_memory

SCRIPT = """
import signal
from functools import partial
from gptoss_opt.apart import Apart, ProcessDied

print("the script runs")
with Apart(partial, signal.raise_signal) as process:
    try:
        process.ask(signal.SIGKILL)
    except ProcessDied as error:
        print(error)
"""


def test_answers_and_errors_come_back() -> None:
    with Apart(partial, divmod, 7, quiet=True) as process:
        assert not process.started
        assert (process.ask(3), process.ask(4)) == ((2, 1), (1, 3))
        with pytest.raises(ZeroDivisionError) as raised:
            process.ask(0)
        assert "in a process of its own:\nTraceback" in str(raised.value.__cause__)
    assert not process.started
    process.close()


def test_a_script_runs_once_and_a_kill_is_said(tmp_path: Path) -> None:
    # With multiprocessing's "spawn" it would run again in its child, and fail for want of `if __name__ == ...`.
    (tmp_path / "script.py").write_text(SCRIPT)
    found = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, check=True)
    assert found.stdout == "the script runs\nkilled by SIGKILL, as a system does where memory runs out\n"
    assert not found.stderr


@pytest.mark.parametrize("name", ["DefaultCPUAllocator: can't allocate memory", "OutOfMemoryError: in a thread"])
def test_what_says_that_memory_ran_out(name: str) -> None:
    assert out_of_memory(RuntimeError(name))
    assert not out_of_memory(ValueError(name))

"""`Apart`: a process of its own that holds what is measured, and answers when it is asked.

It is a new Python, not a fork (a copy of a process that has used torch's threads, or CUDA, may hang), and it does not
run the caller's script again as multiprocessing's "spawn" does: so a script needs no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any

import torch

Answers = Callable[[Any], Any]
"""What a process does with a question; both go through pickle."""

BEGIN = "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from gptoss_opt.apart import serve; serve()"
"""The program of a process: it finds modules where its caller does, and then it serves."""


class ProcessDied(RuntimeError):
    """A process ended before it answered. The message says how."""


class Apart:
    """A process of its own, which makes its answers when it is first asked, and holds them until it is closed.

    Args:
        make: called there, with the arguments and options, for the function that answers. It must lie in a module.
        quiet: whether what is written to stderr there is dropped, such as progress bars.

    Example:
        >>> from functools import partial
        >>> with Apart(partial, divmod, 7) as process:
        ...     process.ask(3)
        (2, 1)
    """

    def __init__(self, make: Callable[..., Answers], *args: Any, quiet: bool = False, **options: Any) -> None:
        self._make = partial(make, *args, **options)
        self._quiet = quiet
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def started(self) -> bool:
        """Whether the process is there."""
        return self._process is not None

    def ask(self, question: Any) -> Any:
        """The answer to a question. What went wrong there is raised here.

        Raises:
            ProcessDied: the process ended before it answered.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", BEGIN],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL if self._quiet else None,
                start_new_session=True,  # Ctrl-C is for the caller alone, who closes this
            )
            self._send(sys.path, self._make, torch.get_num_threads())
        self._send(question)
        assert self._process.stdout is not None
        try:
            answer, error, where = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError) as cut:
            raise ProcessDied(_ending(self._process.wait())) from cut
        if error is not None:
            raise error from RuntimeError(f"in a process of its own:\n{where}")
        return answer

    def _send(self, *messages: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            for message in messages:
                pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise ProcessDied(_ending(self._process.wait())) from error

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # of what was written and is not read any more
                pipe.close()
        self._process = None

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ending(code: int) -> str:
    """How a process ended, in words.

    Example:
        >>> _ending(-9)
        'killed by SIGKILL, as a system does where memory runs out'
    """
    if code >= 0:
        return f"its process ended with exit code {code}"
    why = ", as a system does where memory runs out" if -code == signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{why}"


def serve() -> None:
    """Answer the questions on standard input, until there are no more: what a process apart does."""
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed here is no answer
    try:
        make, threads = pickle.load(questions), pickle.load(questions)
        torch.set_num_threads(threads)
        answer = make()
        for question in _questions(questions):
            _write(answers, answer(question), None)
    except Exception as error:
        _write(answers, None, error)


def _questions(stream: IO[bytes]) -> Iterator[Any]:
    while True:
        try:
            question = pickle.load(stream)
        except EOFError:  # the caller has closed this, or is no more
            return
        yield question


def _write(stream: IO[bytes], answer: Any, error: Exception | None) -> None:
    where = "" if error is None else "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # errors of other libraries may be made of what pickle cannot take, or give back
        error = RuntimeError(f"{type(error).__name__}: {error}")
    pickle.dump((answer, error, where), stream)
    stream.flush()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left.

    Example:
        >>> out_of_memory(MemoryError()), out_of_memory(RuntimeError("the sizes differ"))
        (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch says it of a CPU in a plain RuntimeError, and a batcher in words of its own.
    return isinstance(error, RuntimeError) and any(
        name in str(error) for name in ("DefaultCPUAllocator", "OutOfMemoryError")
    )

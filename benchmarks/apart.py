"""Processes that hold what is measured, and answer when they are asked."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

Answers = Callable[[Any], Any]
"""What a process does with a question; both go through pickle."""


class Apart:
    """A process of its own, which makes its answers when it is first asked, and holds them until it is closed."""

    def __init__(self, make: Callable[..., Answers], *args: Any, **options: Any) -> None:
        self._make = partial(make, *args, **options)
        self._connection: Any = None

    @property
    def started(self) -> bool:
        """Whether the process is there."""
        return self._connection is not None

    def ask(self, question: Any) -> Any:
        """The answer to a question. What went wrong there is raised here."""
        if self._connection is None:
            context = multiprocessing.get_context("spawn")
            self._connection, there = context.Pipe()
            self._process = context.Process(
                target=_serve, args=(there, self._make, torch.get_num_threads()), daemon=True
            )
            self._process.start()
            there.close()
        self._connection.send(question)
        answer = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the process."""
        if self._connection is not None:
            self._connection.close()
            self._process.join()
            self._connection = None


def _serve(connection: Any, make: Callable[[], Answers], threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        answer = make()
        while True:
            connection.send(answer(connection.recv()))
    except EOFError:
        pass
    except Exception as error:
        connection.send(error)

"""Contenders in the process of the tests, where faults can be planted and nothing is imported again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from gptoss_opt.benchmarking import race


class Here:
    """What `Apart` is, in this process."""

    def __init__(self, make: Callable[..., Any], *args: Any, quiet: bool) -> None:
        self._make = partial(make, *args)
        self.answers: Any = None

    def ask(self, question: Any) -> Any:
        """The answer."""
        self.answers = self.answers or self._make()
        return self.answers(question)

    def close(self) -> None:
        """Drop what is held."""
        self.answers = None


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench` measures in this process."""
    monkeypatch.setattr(race, "Apart", Here)

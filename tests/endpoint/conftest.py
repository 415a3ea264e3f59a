"""One model and one server for all tests that leave it as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.endpoint.served import Served, loaded, serving


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return loaded(tmp_path_factory.mktemp("endpoint") / "small")


@pytest.fixture(scope="module")
def served(model: Any) -> Iterator[Served]:
    with serving(model, context=512, max_num_sequences=16, max_waiting=80) as found:
        yield found


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with served.client() as found:
        yield found

"""Fixtures every test may use."""

import pytest
import torch

from tests.helpers import tiny_model


def pytest_configure() -> None:
    # Tiny models spend their time waiting for threads otherwise.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def model() -> torch.nn.Module:
    return tiny_model()

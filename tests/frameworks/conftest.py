"""Two processes for the tests of this folder, started once."""

from collections.abc import Iterator

import pytest

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    group = Ranks(2)
    yield group
    group.stop()

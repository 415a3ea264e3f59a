"""Stacks are tried twice: with the names that wrappers have, and with names that sort the other way round."""

import pytest

from tests.helpers import group_of_one, names_reversed


@pytest.fixture(autouse=True, scope="module")
def _group():
    with group_of_one():
        yield


@pytest.fixture(params=["as named", "against the alphabet"])
def names(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "as named":
        names_reversed(monkeypatch)
    return request.param

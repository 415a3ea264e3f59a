"""The table of docs/frameworks.md: its tests are there, those of this folder are in it, and the page is the table."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.frameworks.table import FRAMEWORKS, PAGE, STACKS, TABLE, Untested, page
from tests.frameworks.training import WRAPS, alone, differs, loop, optimizer_of, wrapped

TESTS = Path(__file__).parents[1]
OF_NO_CELL = {
    # Of models that are wrapped too late, with any wrapper.
    "frameworks/test_deepspeed.py::test_a_model_that_it_holds_already_is_not_wrapped",
}


def named() -> set[str]:
    """Every test that the table names."""
    cells = (cell for row in TABLE.values() for cell in row.values())
    return {test for cell in cells if not isinstance(cell, Untested) for test in cell.tests}


def functions(path: Path) -> set[str]:
    """The tests that a module defines, as the table would name them."""
    tree = ast.parse(path.read_text())
    names = (node.name for node in tree.body if isinstance(node, ast.FunctionDef))
    return {f"{path.relative_to(TESTS)}::{name}" for name in names if name.startswith("test_")}


def test_every_stack_has_a_cell_with_every_framework() -> None:
    assert TABLE.keys() == FRAMEWORKS.keys()
    assert all(list(row) == list(STACKS) == list(WRAPS) for row in TABLE.values())


def test_every_test_that_is_named_is_there() -> None:
    there = {name for file in {one.partition("::")[0] for one in named()} for name in functions(TESTS / file)}
    assert named() <= there, named() - there


def test_every_test_of_a_framework_is_in_the_table() -> None:
    here = set().union(*(functions(path) for path in TESTS.glob("frameworks/test_*.py") if path != Path(__file__)))
    assert here - named() == OF_NO_CELL


def test_the_page_is_what_the_table_says() -> None:
    assert PAGE.read_text() == page(), "write it anew: python -m tests.frameworks.table"


@pytest.mark.parametrize("stack", ["flash", "loss", "monitor"])
def test_a_plain_loop(stack: str) -> None:
    model, expected = wrapped(stack), alone(stack)
    assert differs(loop(model, optimizer_of(model)), expected) < 1e-5
    # Negative control: half of each batch.
    assert differs(alone(stack, rows=2), expected) > 1e-2

"""A table prints aligned or wrapped, and is HTML in a notebook."""

from __future__ import annotations

import re

import pytest

from gptoss_opt.table import SHORT, Table


def test_columns_are_as_wide_as_their_longest_cell() -> None:
    table = Table(("case", "speed"), [("a", "10 tokens/s"), ("a longer one", "")])
    assert str(table).splitlines() == [
        "case          speed",
        "------------  -----------",
        "a             10 tokens/s",
        "a longer one",
    ]
    assert str(Table(("case", "speed"), [])).splitlines() == ["case  speed", "----  -----"]


def test_paragraphs_start_on_lines_of_their_own() -> None:
    table = Table(("case", "why"), [("a", ("one", "another")), (("b", "c"), ())])
    assert str(table).splitlines() == ["case  why", "----  -------", "a     one", "      another", "b", "c"]


def test_cells_are_wrapped_to_widths_with_rules_between_rows() -> None:
    table = Table(("case", "what it changed"), [("a", ("one thing", "")), ("and b", "two")], widths=(4, 8))
    assert str(table).splitlines() == [
        "------+----------",
        " case | what it",
        "      | changed",
        "------+----------",
        " a    | one",
        "      | thing",
        "      |",
        "------+----------",
        " and  | two",
        " b    |",
        "------+----------",
    ]


def test_html_is_escaped() -> None:
    page = Table(("a < b",), [(("x & y", "<b>"),)])._repr_html_()
    assert page == (
        "<div style='margin-bottom:1em'><table><thead><tr><th style='text-align:left'>a &lt; b</th></tr></thead>"
        "<tbody><tr><td style='text-align:left;vertical-align:top;white-space:pre'>"
        "<div style='padding-left:1em;text-indent:-1em'>x &amp; y</div>"
        "<div style='padding-left:1em;text-indent:-1em'>&lt;b&gt;</div></td></tr></tbody></table></div>"
    )


def test_html_breaks_only_what_is_long() -> None:
    page = Table(("a", "b", "c"), [("x" * SHORT, "x" * (SHORT + 1), ())])._repr_html_()
    assert re.findall(r"white-space:([\w-]+)'>(x*)<", page) == [
        ("pre", "x" * SHORT),
        ("pre-wrap", "x" * (SHORT + 1)),
        ("pre", ""),
    ]


def test_a_table_is_itself_in_a_console() -> None:
    table = Table(("case",), [("a",)])
    assert repr(table) == str(table) == "case\n----\na"


@pytest.mark.parametrize("widths", [None, (4, 4)])
def test_a_row_has_a_cell_for_each_column(widths: tuple[int, int] | None) -> None:
    with pytest.raises(ValueError, match="zip"):
        str(Table(("case", "speed"), [("a",)], widths))

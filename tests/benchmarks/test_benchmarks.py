"""The shape of benchmarks: nothing is shown or written that was not verified, and every benchmark has that shape."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks import case, harness
from benchmarks.__main__ import BENCHMARKS, BY_DEFAULT, parser_for
from benchmarks.case import CELLS, Case, Point, Settings


@dataclass(frozen=True)
class Double(Case):
    """Twice a number, which is wrong where it is told to be."""

    value: int
    error: int = 0
    columns = """
        case   | milliseconds        | nothing
        {case} | {seconds!m:.0f} ms  | {absent}
    """

    def setup(self) -> int:
        return 2 * self.value

    def run(self, made: int, repeats: int) -> list[Point]:
        return [{"seconds": made + self.error, "repeats": repeats}]

    def verify(self, made: int, points: list[Point]) -> None:
        assert points[0]["seconds"] == 2 * self.value, "not the double"

    def missed(self, points: list[Point]) -> list[str]:
        return [f"{self.name} is large"] * (self.value > 2)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*cases: Case, **settings: object) -> None:
    case.run("doubles", Settings(repeats=7, threads=1, **settings), lambda settings, folder: cases)


def test_verified_points_are_shown_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(Double("two", 2), Double("three", 3))
    shown = capsys.readouterr().out.splitlines()
    assert [line.split() for line in shown[2:4]] == [["two", "4000", "ms"], ["three", "6000", "ms"]]
    assert shown[4] == "NOT REACHED: three is large"
    points = [json.loads(line) for line in next(tmp_path.iterdir()).read_text().splitlines()]
    assert [(point["case"], point["seconds"], point["repeats"]) for point in points] == [("two", 4, 7), ("three", 6, 7)]
    assert points[0]["command"] == "python -m benchmarks doubles --repeats 7 --threads 1"


def test_nothing_is_shown_that_was_not_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError, match="not the double"):
        run(Double("two", 2), Double("wrong", 2, error=1))
    out = capsys.readouterr().out
    assert "wrong" not in out
    # What was verified before is not lost.
    assert "two" in out
    assert not list(tmp_path.iterdir())


def test_only_runs_some_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(Double("two", 2), Double("wrong", 2, error=1), only="tw")
    assert "two" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match=r"no case of doubles has 'four' in its name. There are:\n  two"):
        run(Double("two", 2), only="four")


def test_an_unknown_name_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser_for(Settings()).parse_args(["nonesuch"])
    message = capsys.readouterr().err
    assert all(name in message for name in BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_the_shape(name: str, tmp_path: Path) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    assert parser_for(module.SETTINGS).parse_args([name]).repeats == module.SETTINGS.repeats
    cases = module.cases(module.SETTINGS, tmp_path)
    assert len({one.name for one in cases}) == len(cases)
    for one in cases:
        headings, patterns = (line.split("|") for line in one.columns.strip().splitlines())
        assert len(headings) == len(patterns)
        # Formats are right, and a row that has no values has empty cells.
        assert not any(CELLS.cell(pattern, {}) for pattern in patterns)


def test_by_default_run_those_that_are_recorded() -> None:
    # By processor: "experts-zen-5.jsonl".
    recorded = {path.stem.partition("-")[0] for path in (Path(case.__file__).parent / "results").glob("*.jsonl")}
    assert set(BY_DEFAULT) <= recorded

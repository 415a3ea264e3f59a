"""Every code block of the README and the docs runs, every docstring example holds, and every link leads somewhere."""

from __future__ import annotations

import doctest
import html
import importlib
import importlib.util
import pkgutil
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import gptoss_opt
from gptoss_opt.core import WRAPPERS
from tests.helpers import GOLDEN, group_of_one, ids, tiny_model

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]
# What is no Python module (a library in C), or needs a package that is not there.
WITH_TRITON = set() if importlib.util.find_spec("triton") else {"triton_kernels", "fused_cuda_kernels"}
WITH_LM_EVAL = set() if importlib.util.find_spec("lm_eval") else {"batcher_lm"}
APART = {"__main__", "_native"} | WITH_TRITON | WITH_LM_EVAL
MODULES = [
    info.name
    for info in pkgutil.walk_packages(gptoss_opt.__path__, "gptoss_opt.")
    if info.name.rpartition(".")[2] not in APART
]


def namespace() -> dict[str, Any]:
    """The names that examples take for granted."""
    names = {name: getattr(gptoss_opt, name) for name in gptoss_opt.__all__}
    return names | {
        "torch": torch,
        "model": tiny_model(),
        "input_ids": ids(1, 8),
        "path": str(GOLDEN),
        "AutoModelForCausalLM": AutoModelForCausalLM,
    }


@pytest.fixture(autouse=True)
def _group_of_one():
    # Examples are those of a script under torchrun with one process.
    with group_of_one():
        yield


@pytest.fixture(autouse=True)
def _forget_the_wrappers_of_examples():
    before = set(WRAPPERS)
    yield
    for name in set(WRAPPERS) - before:
        del WRAPPERS[name]


def test_the_example_of_streaming_runs() -> None:
    greedy, sampled = runpy.run_path(str(ROOT / "docs" / "examples" / "streaming.py"))["tokens"]
    assert (len(greedy), len(sampled)) == (12, 8)


def test_the_example_of_monitoring_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("sys.argv", ["monitoring.py", str(tmp_path / "monitor.svg")])
    monitor = runpy.run_path(str(ROOT / "docs" / "examples" / "monitoring.py"))["monitor"]
    assert str(monitor.report(last=5)) in capsys.readouterr().out
    assert monitor.steps[-1].loss < monitor.steps[0].loss
    assert "tokens of each expert" in (tmp_path / "monitor.svg").read_text()


def test_pictures_are_of_what_the_commands_say_now(tmp_path: Path) -> None:
    pictures = runpy.run_path(str(ROOT / "docs" / "pictures.py"))

    def words(svg: str) -> list[str]:
        return html.unescape(re.sub(r"<style>.*?</style>|<[^>]*>", "", svg, flags=re.DOTALL)).split()

    # Other pictures are of the machine that they were made on.
    shown = words((pictures["IMAGES"] / "plan.svg").read_text())
    assert shown == words(pictures["drawn"]("plan", tmp_path))
    assert len(shown) > 100
    for name, command in pictures["COMMANDS"].items():
        page = ROOT / "docs" / ("verify.md" if name == "doctor" else f"{name}.md")
        assert f"images/{name}.svg" in page.read_text(), name
        assert command in page.read_text(), name
        assert (pictures["IMAGES"] / f"{name}.svg").exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pages name the released checkpoint; offline, the small one stands in.
    load = AutoModelForCausalLM.from_pretrained

    def from_pretrained(name: str, dtype: torch.dtype = torch.float32) -> Any:
        # Older versions leave dequantised experts in bfloat16.
        return load(name if Path(name).is_dir() else GOLDEN, dtype=dtype).to(dtype)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    names = namespace() | {"folder": str(tmp_path)}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for test in doctest.DocTestFinder().find(importlib.import_module(module)):
        test.globs.update(namespace() | {"folder": tmp_path / "folder"})
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test)
        assert not result.failed, f"{test.name}: see the output"


def test_public_functions_have_examples() -> None:
    for name in gptoss_opt.__all__:
        if name.startswith(("with_", "shard_")) or name in {"compose", "explain", "undo", "stack_of", "Stack"}:
            assert ">>>" in (getattr(gptoss_opt, name).__doc__ or ""), name

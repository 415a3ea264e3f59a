"""What decides whether a release is whole, and what the project promises of it."""

from __future__ import annotations

import ast
import runpy
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

import gptoss_opt

ROOT = Path(__file__).parents[2]
WHEEL = "gptoss_opt-0.1.0-py3-none-manylinux_2_28_x86_64.whl"
NEEDED = ("gptoss_opt/__init__.py", "gptoss_opt/py.typed", "gptoss_opt/kernels/native/_native.so")


def wheel(folder: Path, *names: str, called: str = WHEEL) -> Path:
    with zipfile.ZipFile(folder / called, "w") as archive:
        for name in (*names, "gptoss_opt-0.1.0.dist-info/METADATA"):
            archive.writestr(name, "")
    return folder / called


def test_a_wheel_that_is_whole_and_those_that_are_not(tmp_path: Path) -> None:
    wrong_with = runpy.run_path(str(ROOT / "scripts" / "check_dist.py"))["wrong_with"]
    assert wrong_with(wheel(tmp_path, *NEEDED)) == []
    (said,) = wrong_with(wheel(tmp_path, *NEEDED[:2]))
    assert "there was no C compiler" in said
    (said,) = wrong_with(wheel(tmp_path, *NEEDED[::2]))
    assert "py.typed" in said
    for stray in ("tests/helpers.py", "gptoss_opt/kernels/native/c/common.h"):
        (said,) = wrong_with(wheel(tmp_path, *NEEDED, stray))
        assert stray in said
    for name in (
        "gptoss_opt-0.1.0-cp311-cp311-manylinux_2_28_x86_64.whl",
        "gptoss_opt-0.1.0-py3-none-linux_x86_64.whl",
    ):
        (said,) = wrong_with(wheel(tmp_path, *NEEDED, called=name))
        assert "its name" in said


def test_a_folder_without_all_that_is_released(tmp_path: Path) -> None:
    problems = runpy.run_path(str(ROOT / "scripts" / "check_dist.py"))["problems"]
    wheel(tmp_path, *NEEDED)
    assert problems(tmp_path) == ["0 source distributions and 1 wheels"]
    if not (ROOT / ".git").exists():
        pytest.skip("what a source distribution lacks is known in a git repository alone")
    with tarfile.open(tmp_path / "gptoss_opt-0.1.0.tar.gz", "w:gz") as archive:
        archive.add(ROOT / "setup.py", "gptoss_opt-0.1.0/setup.py")
    found = problems(tmp_path)
    assert any("lacks Makefile" in one for one in found)
    assert not any("lacks setup.py" in one for one in found)


def test_files_that_name_the_version_agree(tmp_path: Path) -> None:
    found = runpy.run_path(str(ROOT / "scripts" / "check_version.py"))
    assert found["unready"](ROOT, gptoss_opt.__version__) == []
    for name in found["PLACES"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in found["PLACES"]:
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace(gptoss_opt.__version__, "0.0.9"))
        (said,) = found["unready"](tmp_path, gptoss_opt.__version__)
        assert said.startswith(name)
        (tmp_path / name).write_text(text)


def calls(source: str) -> list[str]:
    """What a source does that SECURITY.md promises not to do."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            found.append("trust_remote_code")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if options.get("weights_only") != "True":
                found.append(ast.unparse(node.func))
    return found


# Processes of ours that talk to each other, and what they leave in a temporary folder.
OURS = {"apart.py", "demo/decoding.py", "demo/finetuning.py", "demo/measure.py"}


def test_nothing_that_may_run_code_is_read() -> None:
    package = Path(gptoss_opt.__file__).parent
    found = {str(path.relative_to(package)): calls(path.read_text()) for path in sorted(package.rglob("*.py"))}
    assert {name for name, what in found.items() if what} <= OURS
    # Negative control.
    assert calls("torch.load(path)\ntorch.load(path, weights_only=True)\nf(trust_remote_code=True)") == [
        "torch.load",
        "trust_remote_code",
    ]

"""transformers' Trainer under torchrun: a script in which only the wrapper is parallel learns as one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file

from tests.helpers import relative

# Before it, the Trainer refuses any tensor parallelism, and says so.
KNOWS_SHARDS = Version(version("accelerate")) >= Version("1.12")

History = dict[str, list[float]]


def run(how: str, num_ranks: int, batch_size: int, folder: Path) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    script = ["-m", "tests.distributed.train", how, str(batch_size), str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, *(torchrun if num_ranks > 1 else []), *script]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def history(how: str, num_ranks: int, batch_size: int, folder: Path) -> History:
    done = run(how, num_ranks, batch_size, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    found: History = json.loads((folder / "history.json").read_text())
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[History, Path]:
    folder = tmp_path_factory.mktemp("alone")
    return history("one", 1, 4, folder), folder


@pytest.mark.skipif(not KNOWS_SHARDS, reason="the Trainer needs accelerate 1.12 for models that are sharded")
@pytest.mark.parametrize(
    ("how", "num_ranks", "batch_size"),
    [("tp", 2, 4), ("ep", 2, 4), ("tp + ep", 2, 4), ("tp x dp", 4, 2), ("all to all", 2, 2)],
)
def test_the_same_curve(alone: tuple[History, Path], tmp_path: Path, how: str, num_ranks: int, batch_size: int) -> None:
    expected, folder = alone
    found = history(how, num_ranks, batch_size, tmp_path)
    assert len(found["loss"]) == 20
    for key in ("loss", "norm"):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=0)
    # And save_model writes what one process writes.
    one, other = load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors")
    assert one.keys() == other.keys()
    assert max(relative(one[key], other[key]) for key in other) < 1e-6


@pytest.mark.skipif(not KNOWS_SHARDS, reason="the Trainer needs accelerate 1.12 for models that are sharded")
def test_replicas_that_do_not_average_gradients_are_noticed(alone: tuple[History, Path], tmp_path: Path) -> None:
    found = history("tp x dp without the mean", 4, 2, tmp_path)
    differences = [abs(a / b - 1) for a, b in zip(found["loss"], alone[0]["loss"], strict=True)]
    assert differences[0] < 1e-6
    assert max(differences) > 1e-2


@pytest.mark.skipif(KNOWS_SHARDS, reason="accelerate knows of models that are sharded")
def test_an_older_accelerate_is_refused_by_the_trainer(tmp_path: Path) -> None:
    done = run("tp", 2, 4, tmp_path)
    assert done.returncode
    assert "accelerate" in done.stderr
    assert "Tensor Parallelism" in done.stderr

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


def run(num_ranks: int, folder: Path, hows: dict[str, int]) -> subprocess.CompletedProcess[str]:
    """Train in several ways, each with a batch of so many rows on each rank, by one start of the processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    script = ["-m", "tests.distributed.train", str(folder), *(f"{how}:{size}" for how, size in hows.items())]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, *(torchrun if num_ranks > 1 else []), *script]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def curves(num_ranks: int, folder: Path, hows: dict[str, int]) -> dict[str, tuple[History, Path]]:
    """The history of each training, and where its model is."""
    done = run(num_ranks, folder, hows)
    assert done.returncode == 0, done.stderr[-4000:]
    return {how: (json.loads((folder / how / "history.json").read_text()), folder / how) for how in hows}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[History, Path]:
    return curves(1, tmp_path_factory.mktemp("alone"), {"one": 4})["one"]


def same(found: tuple[History, Path], expected: tuple[History, Path]) -> None:
    assert len(found[0]["loss"]) == 20
    for key in ("loss", "norm"):
        torch.testing.assert_close(found[0][key], expected[0][key], rtol=1e-4, atol=0)
    # And save_model writes what one process writes.
    one, other = (load_file(folder / "model.safetensors") for _, folder in (found, expected))
    assert one.keys() == other.keys()
    assert max(relative(one[key], other[key]) for key in other) < 1e-6


@pytest.mark.skipif(not KNOWS_SHARDS, reason="the Trainer needs accelerate 1.12 for models that are sharded")
def test_two_ranks_learn_as_one_process(alone: tuple[History, Path], tmp_path: Path) -> None:
    shared = dict.fromkeys(("tp", "ep", "tp + ep", "full, tp + ep"), 4)
    for found in curves(2, tmp_path, {**shared, "all to all": 2, "full": 2}).values():
        same(found, alone)


@pytest.mark.skipif(not KNOWS_SHARDS, reason="the Trainer needs accelerate 1.12 for models that are sharded")
def test_two_replicas_of_two_ranks_learn_as_one_process(alone: tuple[History, Path], tmp_path: Path) -> None:
    found = curves(4, tmp_path, {"tp x dp": 2, "tp x dp without the mean": 2})
    same(found["tp x dp"], alone)
    # Negative control: replicas that do not average their gradients part from it after the first step.
    losses = found["tp x dp without the mean"][0]["loss"]
    differences = [abs(a / b - 1) for a, b in zip(losses, alone[0]["loss"], strict=True)]
    assert differences[0] < 1e-6
    assert max(differences) > 1e-2


@pytest.mark.skipif(KNOWS_SHARDS, reason="accelerate knows of models that are sharded")
def test_an_older_accelerate_is_refused_by_the_trainer(tmp_path: Path) -> None:
    done = run(2, tmp_path, {"tp": 4})
    assert done.returncode
    assert "accelerate" in done.stderr
    assert "Tensor Parallelism" in done.stderr

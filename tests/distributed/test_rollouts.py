"""GRPO by TRL on two processes, each of which samples on the model that it trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import relative

pytest.importorskip("trl", reason="TRL needs Python 3.11")


def on_two_ranks(folder: Path, *hows: str) -> dict[str, list[dict[str, Any]]]:
    """What each rank has found, by how."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*torchrun, "tests.distributed.train_grpo", str(folder), *hows]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return {how: [json.loads((folder / f"{how} {rank}.json").read_text()) for rank in range(2)] for how in hows}


def test_ranks_with_models_of_their_own_learn_as_with_transformers_generate(tmp_path: Path) -> None:
    found = on_two_ranks(tmp_path, "rollouts", "transformers", "sharded")
    for ours, theirs in zip(found["rollouts"], found["transformers"], strict=True):
        adapters, wanted = ours.pop("adapters"), theirs.pop("adapters")
        assert ours == {name: pytest.approx(curve, rel=1e-6, abs=1e-9) for name, curve in theirs.items()}
        assert max(relative(torch.tensor(a), torch.tensor(b)) for a, b in zip(adapters, wanted, strict=True)) < 1e-6
        assert len({*ours["reward"]}) == len(ours["reward"])
    for one in found["sharded"]:
        assert "several ranks hold this model together" in one["refused"]
        assert "Use DDP" in one["refused"]

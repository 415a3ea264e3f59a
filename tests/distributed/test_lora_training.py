"""Adapters trained on two processes, by torchrun and accelerate launch: as by one process, and saved for peft."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from gptoss_opt import load_adapter
from tests.distributed import train_lora
from tests.distributed.models import UNEVEN
from tests.distributed.test_trainer import KNOWS_SHARDS
from tests.helpers import ids, relative
from tests.train.twins import plain

# peft asks transformers by a name that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
# On CPUs alone it starts processes by MPI; what it says to start for GPUs it starts by torchrun.
ACCELERATE = [
    *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no", "-m"),
]
History = dict[str, list[float]]


def launched(launcher: list[str], folder: Path, *hows: str) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", *launcher, "tests.distributed.train_lora", str(folder), *hows]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def history(folder: Path) -> History:
    return json.loads((folder / "history.json").read_text())


def same(found: Path, expected: Path) -> None:
    """The same curves and the same adapter, which peft reads."""
    one, other = history(found), history(expected)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=0)
    assert one["loss"][-1] < 0.9 * one["loss"][0]
    tensors, wanted = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (found, expected))
    assert tensors.keys() == wanted.keys()
    assert max(relative(tensors[name], wanted[name]) for name in wanted) < 1e-5
    logits = load_adapter(plain(**UNEVEN), found / "adapter")(ids()).logits
    twin = PeftModel.from_pretrained(plain(**UNEVEN), found / "adapter").eval()
    assert relative(twin(ids()).logits, logits) < 1e-5
    # Negative control: the adapter counts.
    assert relative(plain(**UNEVEN)(ids()).logits, logits) > 1e-2


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("alone")
    train_lora.main("one", folder)
    return folder


def test_under_torchrun_the_trainer_learns_as_one_process(alone: Path, tmp_path: Path) -> None:
    hows = ["ddp", *(train_lora.SHARED if KNOWS_SHARDS else ())]
    launched(TORCHRUN, tmp_path, *hows)
    for how in hows:
        same(tmp_path / how, alone)
    # What counts as the best is the checkpoint in the middle, which was loaded again on all ranks.
    middle, end, again = history(alone)["evaluated"]
    assert again == pytest.approx(middle, rel=1e-9)
    assert end < 0.9 * middle


def test_under_accelerate_launch_a_loop_learns_as_one_process(tmp_path: Path) -> None:
    train_lora.main("accelerate", tmp_path / "alone")
    launched(ACCELERATE, tmp_path, "accelerate", "accelerate, apart")
    same(tmp_path / "accelerate", tmp_path / "alone")
    # Negative control: ranks that do not average their gradients part after the first step.
    losses = [history(tmp_path / how)["loss"] for how in ("accelerate, apart", "alone")]
    differences = [abs(one / other - 1) for one, other in zip(*losses, strict=True)]
    assert differences[0] < 1e-6
    assert max(differences) > 1e-2

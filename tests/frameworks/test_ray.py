"""Ray Train: a TorchTrainer with two CPU workers, whose loop wraps the model before `prepare_model`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.frameworks.table import refusals_of, stacks_of
from tests.frameworks.training import WRAPS, alone, differs, logits, logits_alone, loop, optimizer_of, wrapped
from tests.helpers import relative

ray = pytest.importorskip("ray", reason="ray is not installed: make test-frameworks")
pytest.importorskip("ray.train.torch", reason="ray was installed without its [train]")

# Ray's own.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:::ray"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def train_loop(config: dict[str, Any]) -> None:
    """What a user writes, for every stack in turn; the folder that it reports is what Ray keeps."""
    import tempfile

    from ray.train import Checkpoint, get_context, report
    from ray.train.torch import prepare_model

    torch.set_num_threads(1)
    rank, found = get_context().get_world_rank(), {}
    with tempfile.TemporaryDirectory() as folder:
        for stack in config["stacks"]:
            model = wrapped(stack)
            try:
                prepared = prepare_model(model)
            except ValueError as error:
                found[stack] = str(error)
                continue
            found[stack] = loop(prepared, optimizer_of(model), torch.Tensor.backward, rank, 2)
            torch.save(model.state_dict(), Path(folder, f"{stack}.pt"))
        report({"found": found}, checkpoint=Checkpoint.from_directory(folder) if rank == 0 else None)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    root = str(Path(__file__).parents[2])
    variables = {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "RAY_TRAIN_V2_ENABLED": "1"}
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        runtime_env={"env_vars": variables},
    )
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"stacks": list(WRAPS)},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
        run_config=RunConfig(storage_path=str(tmp_path_factory.mktemp("ray")), name="stacks"),
    )
    yield trainer.fit()
    ray.shutdown()


@pytest.mark.parametrize("stack", stacks_of("ray"))
def test_it_learns_as_one_process(result: Any, stack: str) -> None:
    expected = alone(stack)
    assert differs(result.metrics["found"][stack], expected) < 1e-5
    # Negative control: one worker's half of each batch.
    assert differs(alone(stack, rows=2), expected) > 1e-2
    # What it keeps goes into a model under the same stack.
    model, says = wrapped(stack), logits_alone(stack)
    assert relative(logits(model), says) > 1e-2
    with result.checkpoint.as_directory() as folder:
        model.load_state_dict(torch.load(Path(folder, f"{stack}.pt"), weights_only=True))
    assert relative(logits(model), says) < 1e-5


@pytest.mark.parametrize(("stack", "sentence"), refusals_of("ray"))
def test_refused(result: Any, stack: str, sentence: str) -> None:
    assert sentence in result.metrics["found"][stack]

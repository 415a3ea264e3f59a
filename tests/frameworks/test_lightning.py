"""Lightning: a LightningModule around a wrapped model, in one process and by its DDP on two."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from tests.distributed.ranks import Ranks
from tests.frameworks import training
from tests.frameworks.table import refusals_of, stacks_of
from tests.frameworks.training import Losses, alone, batch, differs, logits, optimizer_of, wrapped
from tests.helpers import relative

lightning = pytest.importorskip("lightning", reason="lightning is not installed: make test-frameworks")

# Lightning's and torch's own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:::lightning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning"),
]


class Learner(lightning.LightningModule):
    """What a user writes: the model inside, its loss, its optimizer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: Losses = []

    def training_step(self, rows: Tensor, number: int) -> Tensor:
        loss: Tensor = self.model(input_ids=rows, labels=rows).loss
        self.losses.append(training.mean(loss) if distributed.is_initialized() else loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self.model)


def fitted(model: Any, folder: Path, part: int = 0, parts: int = 1, **options: Any) -> tuple[Learner, Any]:
    learner = Learner(model)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, default_root_dir=folder, enable_checkpointing=False, **quiet, **options
    )
    steps = [batch(step, part, parts) for step in range(training.STEPS)]
    trainer.fit(learner, torch.utils.data.DataLoader(steps, batch_size=None))
    return learner, trainer


@pytest.mark.parametrize("stack", stacks_of("lightning"))
def test_it_learns_as_a_plain_loop(stack: str, tmp_path: Path) -> None:
    learner, trainer = fitted(wrapped(stack), tmp_path, devices=1)
    expected = alone(stack)
    assert differs(learner.losses, expected) < 1e-5
    # Negative control: half of each batch.
    assert differs(alone(stack, rows=2), expected) > 1e-2
    # What it saves goes into a model under the same stack.
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    again = Learner(wrapped(stack))
    before = logits(again.model)
    again.load_state_dict(torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(logits(again.model), logits(learner.model))
    assert relative(before, logits(learner.model)) > 1e-2


@contextmanager
def launched() -> Iterator[None]:
    """The environment that Lightning's launcher gives its processes."""
    rank = str(distributed.get_rank())
    environment = {"LOCAL_RANK": rank, "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name in environment:
            os.environ.pop(name, None)


def in_ddp(stack: str, folder: Path) -> Losses:
    with launched():
        ddp = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
        return fitted(wrapped(stack), folder, distributed.get_rank(), 2, **ddp)[0].losses


@pytest.mark.parametrize("stack", stacks_of("lightning"))
def test_in_ddp_it_learns_as_one_process(two: Ranks, stack: str, tmp_path: Path) -> None:
    for losses in two(in_ddp, stack, tmp_path):
        assert differs(losses, alone(stack)) < 1e-5


def said(stack: str, folder: Path) -> str:
    with pytest.raises(ValueError, match="spread over ranks") as error:
        in_ddp(stack, folder)
    return str(error.value)


@pytest.mark.parametrize(("stack", "sentence"), refusals_of("lightning"))
def test_refused(two: Ranks, stack: str, sentence: str, tmp_path: Path) -> None:
    for found in two(said, stack, tmp_path):
        assert sentence in found

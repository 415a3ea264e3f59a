"""DeepSpeed's ZeRO-3 on two CPU processes: it spreads what the wrappers left, if they come first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

import gptoss_opt
from gptoss_opt import CompatibilityError, stack_of, undo, with_lora
from tests.distributed.ranks import Ranks
from tests.frameworks.table import refusals_of, stacks_of
from tests.frameworks.training import (
    STEPS,
    Losses,
    alone,
    batch,
    differs,
    logits,
    logits_alone,
    mean,
    optimizer_of,
    wrapped,
)
from tests.helpers import relative
from tests.train.twins import plain

pytest.importorskip("deepspeed", reason="deepspeed is not installed: make test-frameworks")

DTYPE = torch.float32
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    # All parameters are spread, small ones too.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    # Its default is 1.
    "gradient_clipping": 0.0,
}


@contextmanager
def launched() -> Iterator[Any]:
    """DeepSpeed, in the environment that its launcher gives its processes, without compiling operators of its own."""
    import deepspeed

    rank = str(distributed.get_rank())
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(environment)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    try:
        yield deepspeed
    finally:
        for name in environment:
            os.environ.pop(name, None)


def engine_of(deepspeed: Any, model: Any) -> Any:
    return deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=CONFIG)[0]


def learned(stack: str, folder: Path) -> tuple[Losses, Tensor, Tensor]:
    """The losses, what the model says then, and what one says that reads the saved checkpoint."""
    with launched() as deepspeed:
        engine = engine_of(deepspeed, wrapped(stack, DTYPE))
        assert all(parameter.numel() == 0 for parameter in engine.module.parameters()), "nothing was spread"
        losses = []
        for step in range(STEPS):
            rows = batch(step, distributed.get_rank(), 2)
            loss = engine(input_ids=rows, labels=rows).loss
            engine.backward(loss)
            engine.step()
            losses.append(mean(loss))
        says = logits(engine)
        engine.save_checkpoint(str(folder))
        again = engine_of(deepspeed, wrapped(stack, DTYPE))
        again.load_checkpoint(str(folder))
        return losses, says, logits(again)


@pytest.mark.parametrize("stack", stacks_of("deepspeed"))
def test_it_learns_as_one_process(two: Ranks, stack: str, tmp_path: Path) -> None:
    expected = alone(stack, DTYPE)
    for losses, says, again in two(learned, stack, tmp_path):
        assert differs(losses, expected) < 1e-5
        assert relative(says, logits_alone(stack, DTYPE)) < 1e-4
        assert torch.equal(again, says)
        assert relative(logits(wrapped(stack, DTYPE)), says) > 1e-2
    # Negative control: one rank's half of each batch.
    assert differs(alone(stack, DTYPE, rows=2), expected) > 1e-2


def wrapped_too_late() -> list[str]:
    with launched() as deepspeed:
        model = engine_of(deepspeed, plain(DTYPE)).module
        found = []
        for name in sorted(name for name in gptoss_opt.__all__ if name.startswith(("with_", "shard_"))):
            with pytest.raises(CompatibilityError) as error:
                getattr(gptoss_opt, name)(model)
            found.append(str(error.value))
        assert not stack_of(model)
        model = engine_of(deepspeed, wrapped("adapters", DTYPE)).module
        with pytest.raises(CompatibilityError, match=r"lora_\w+ would be dropped, and is held by DeepSpeed's ZeRO-3"):
            undo(model, with_lora, discard=True)
        return found


def test_a_model_that_it_holds_already_is_not_wrapped(two: Ranks) -> None:
    for found in two(wrapped_too_late):
        assert len(found) == 10
        for sentence in found:
            assert "DeepSpeed's ZeRO-3 holds the parameters of this model" in sentence
            assert "Wrap the model first, then deepspeed.initialize what you get" in sentence


def said(stack: str) -> str:
    with launched() as deepspeed:
        model = wrapped(stack, DTYPE)
        with pytest.raises((RuntimeError, ValueError)) as error:
            engine_of(deepspeed, model)
        return str(error.value)


@pytest.mark.parametrize(("stack", "sentence"), refusals_of("deepspeed"))
def test_refused(two: Ranks, stack: str, sentence: str) -> None:
    for found in two(said, stack):
        assert sentence in found

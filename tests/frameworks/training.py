"""The stacks of the table, and the short training that every framework must repeat: in one process, by a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from gptoss_opt import (
    compose,
    shard_experts,
    shard_tensor_parallel,
    with_chunked_loss,
    with_flash_attention,
    with_full_finetuning,
    with_lora,
    with_monitor,
    with_mxfp4_experts,
)
from tests.helpers import ids
from tests.train.twins import begun, plain

STEPS, BATCH, LENGTH = 4, 4, 12

Losses = list[float]


def adapters(model: Any) -> Any:
    """Adapters on attention and packed experts, which do something already."""
    return begun(compose(with_mxfp4_experts(), with_lora(rank=4, dtype=model.dtype))(model))


WRAPS: dict[str, Callable[[Any], Any]] = {
    "adapters": adapters,
    "full": with_full_finetuning,
    "flash": with_flash_attention,
    "sharded": lambda model: shard_experts(shard_tensor_parallel(model)),
    "loss": with_chunked_loss,
    "monitor": lambda model: with_monitor(model, every=1, to=()),
}
"""What a user writes for each column of the table."""


def wrapped(stack: str, dtype: torch.dtype = torch.float64) -> Any:
    """A tiny model under a stack, in training mode; in float64 no curve parts from another by rounding."""
    return WRAPS[stack](plain(dtype)).train()


def reference(stack: str, dtype: torch.dtype = torch.float64) -> Any:
    """What must learn as it does: plain transformers, or for adapters the same ones, whose own tests are elsewhere."""
    return (adapters(plain(dtype)) if stack == "adapters" else plain(dtype)).train()


def tokens() -> Tensor:
    """The rows of all steps, [BATCH * STEPS, LENGTH]: two batches, each twice."""
    return torch.cat([ids(BATCH, LENGTH, seed=step % 2) for step in range(STEPS)])


def batch(step: int, part: int = 0, parts: int = 1) -> Tensor:
    """The rows of a step, or one of several equal parts of them."""
    return tokens().chunk(STEPS)[step].chunk(parts)[part]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """One that does not forgive gradients of another size, as AdamW would."""
    return torch.optim.SGD(trained(model), lr=0.05, momentum=0.9)


def loop(model: Any, optimizer: Any, backward: Callable[[Tensor], Any] = Tensor.backward, *part: int) -> Losses:
    """The training: each step's loss is averaged over the ranks if each has its part of the batch."""
    found = []
    for step in range(STEPS):
        rows = batch(step, *part)
        loss = model(input_ids=rows, labels=rows).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(mean(loss) if part else loss.item())
    return found


def mean(loss: Tensor) -> float:
    """The mean of a number over the ranks."""
    total = loss.detach().clone()
    distributed.all_reduce(total)
    return total.item() / distributed.get_world_size()


def alone(stack: str, dtype: torch.dtype = torch.float64, *, rows: int = BATCH) -> Losses:
    """What one process learns, from the first rows of each batch or all."""
    model = reference(stack, dtype)
    optimizer, found = optimizer_of(model), []
    for step in range(STEPS):
        loss = model(batch(step)[:rows], labels=batch(step)[:rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def differs(found: Losses, expected: Losses) -> float:
    """How far two curves are from each other, at most, relative to the second."""
    assert len(found) == len(expected) == STEPS
    return max(abs(one / other - 1) for one, other in zip(found, expected, strict=True))


def logits(model: Any) -> Tensor:
    """What a model says of some tokens, in evaluation mode."""
    model.eval()  # an engine of DeepSpeed returns nothing
    with torch.no_grad():
        return model(ids()).logits.float()


def logits_alone(stack: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """What a model says that one process has trained under a stack."""
    model = wrapped(stack, dtype)
    loop(model, optimizer_of(model))
    return logits(model)

"""accelerate on two processes and in one: DDP, its tensor parallelism, its FSDP2 plugin, bfloat16, and offloading."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, distributed

from gptoss_opt import CompatibilityError, gather_state_dict, with_flash_attention
from tests.distributed.ranks import Ranks
from tests.distributed.test_trainer import KNOWS_SHARDS
from tests.frameworks.table import OFFLOADED, TOGETHER, stacks_of
from tests.frameworks.training import (
    WRAPS,
    Losses,
    alone,
    differs,
    logits,
    logits_alone,
    loop,
    optimizer_of,
    reference,
    wrapped,
)
from tests.helpers import ids, relative, tiny_model
from tests.train.twins import plain


@contextmanager
def accelerator(**options: Any) -> Iterator[accelerate.Accelerator]:
    """An accelerator as torchrun would have it make one."""
    rank = str(distributed.get_rank())
    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(torchrun)
    try:
        yield accelerate.Accelerator(cpu=True, **options)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        for name in torchrun:
            os.environ.pop(name, None)


def in_ddp(stack: str, dtype: torch.dtype = torch.float64) -> Losses:
    with accelerator() as one:
        model = wrapped(stack, dtype)
        prepared, optimizer = one.prepare(model, optimizer_of(model))
        assert isinstance(prepared, torch.nn.parallel.DistributedDataParallel)
        return loop(prepared, optimizer, one.backward, distributed.get_rank(), 2)


@pytest.mark.parametrize("stack", [one for one in stacks_of("ddp") if one != "sharded"])
def test_on_two_processes_it_learns_as_one(two: Ranks, stack: str) -> None:
    expected = alone(stack)
    for losses in two(in_ddp, stack):
        assert differs(losses, expected) < 1e-5
    # Negative control: one process's half of each batch.
    assert differs(alone(stack, rows=2), expected) > 1e-2


def refused_in_ddp(dtype: torch.dtype) -> str:
    with pytest.raises(ValueError, match="spread over ranks") as error:
        in_ddp("sharded", dtype)
    return str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_refused(two: Ranks, dtype: torch.dtype) -> None:
    for said in two(refused_in_ddp, dtype):
        assert TOGETHER in said


def in_tensor_parallelism() -> Losses:
    options = {"parallelism_config": accelerate.ParallelismConfig(tp_size=2)}
    model = wrapped("sharded")
    with accelerator(**options) as one:
        prepared = one.prepare(model)
        assert prepared is model
        return loop(prepared, optimizer_of(model), one.backward)


@pytest.mark.skipif(not KNOWS_SHARDS, reason="accelerate 1.12 knows models that are sharded")
def test_sharded_models_in_its_tensor_parallelism(two: Ranks) -> None:
    for losses in two(in_tensor_parallelism):
        assert differs(losses, alone("sharded")) < 1e-5


# FSDP2


def in_fsdp2(stack: str, folder: Path) -> Losses:
    with accelerator() as one:
        # accelerate keeps it for devices; on CPUs its state must be told by hand.
        one.state.distributed_type = DistributedType.FSDP
        one.state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["GptOssDecoderLayer"],
            cpu_ram_efficient_loading=False,
        )
        model = wrapped(stack)
        prepared, optimizer = one.prepare(model, optimizer_of(model))
        assert type(prepared).__name__.startswith("FSDP")
        losses = loop(prepared, optimizer, one.backward, distributed.get_rank(), 2)
        whole = {name: tensor for name, tensor in gather_state_dict(prepared) if tensor is not None}
        if one.is_main_process:
            torch.save(whole, folder / "model.pt")
        distributed.barrier()
        return losses


@pytest.mark.parametrize("stack", stacks_of("fsdp plugin"))
def test_its_fsdp2_plugin(two: Ranks, stack: str, tmp_path: Path) -> None:
    expected = alone(stack)
    for losses in two(in_fsdp2, stack, tmp_path):
        assert differs(losses, expected) < 1e-5
    # What is gathered goes into a model under the same stack.
    model, says = wrapped(stack), logits_alone(stack)
    assert relative(logits(model), says) > 1e-2
    model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert relative(logits(model), says) < 1e-5


# In one process


def in_bfloat16(model: Any) -> Losses:
    AcceleratorState._reset_state(reset_partial_state=True)  # of whatever ran before in this process
    one = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    try:
        prepared, optimizer = one.prepare(model, optimizer_of(model))
        return loop(prepared, optimizer, one.backward)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("stack", stacks_of("autocast"))
def test_in_mixed_precision_it_is_as_exact_as_plain_transformers(stack: str) -> None:
    exact = alone(stack, torch.float32)
    found, expected = (differs(in_bfloat16(make(stack, torch.float32)), exact) for make in (wrapped, reference))
    assert 0 < found < 2 * expected + 5e-3
    # Negative control: half of each batch.
    assert differs(alone(stack, torch.float32, rows=2), exact) > found


@pytest.mark.parametrize("stack", ["adapters", "full"])
def test_offloaded(stack: str) -> None:
    offloaded = accelerate.cpu_offload(tiny_model(), execution_device="cpu")
    with pytest.raises(CompatibilityError, match=OFFLOADED):
        WRAPS[stack](offloaded)


def test_offloaded_models_compute() -> None:
    model = accelerate.cpu_offload(with_flash_attention(plain()), execution_device="cpu")
    with torch.no_grad():
        found: Tensor = model(ids()).logits
    assert relative(found, plain()(ids()).logits) < 1e-6
    with torch.no_grad():
        assert relative(model(ids(seed=2)).logits, found) > 1e-2

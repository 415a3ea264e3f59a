"""`optimize`: a plan for this machine, carried out."""

from __future__ import annotations

import os
from typing import Any

from torch import distributed

from ..checkpoint import load
from ..distributed import init_distributed
from .hardware import Hardware, machine_of
from .plan import Plan, plan
from .target import PLACEHOLDER
from .workload import Objective, Task


class PlanError(RuntimeError):
    """A plan cannot be carried out here. The message says what can be done instead."""


def optimize(
    model: Any,
    *,
    hardware: str | Hardware | None = None,
    task: Task = "generate",
    context: int = 4096,
    batch: int = 1,
    objective: Objective = "fit",
) -> Any:
    """Plan for this machine, and load or wrap the model so. The model comes back with the plan on it: `model.plan`.

    Args:
        model: a model, which is wrapped and returned; or a folder or a name on the hub, which is loaded. "20b" and
            "120b" are the released ones on the hub.
        hardware: as `plan` takes it: what this machine is planned as, if not as it is found.
        task, context, batch, objective: see `plan`.

    Raises:
        PlanError: it does not fit, or it takes several processes that were not started; nothing is loaded or changed.
        CheckpointError, CompatibilityError: see `load`.

    Example:
        >>> model = optimize(path, task="lora", context=64)
        >>> [wrapper.name for wrapper in stack_of(model)]
        ['with_mxfp4_experts', 'with_flash_attention', 'with_lora', 'with_chunked_loss']
        >>> model.plan.fits
        True
    """
    machine = machine_of(hardware)
    found = plan(model, hardware=machine, task=task, context=context, batch=batch, objective=objective)
    if found.source == PLACEHOLDER:
        raise PlanError("a config has no weights to load. Give the folder or the name of a checkpoint, or a model.")
    if not found.fits:
        raise PlanError(" ".join([found.verdict, *(f"To make it fit: {one}." for one in found.to_fit)]))
    if machine.count > 1:
        _meet(found)
    if found.source is None:
        made = found.stack(model)
    else:
        kind, number = machine.device.kind, os.environ.get("LOCAL_RANK", "0")
        device = f"cuda:{number}" if kind == "cuda" else kind
        made = load(found.source, found.stack, device=device, memory_map=found.memory_map)
    made.plan = found
    return made


def _meet(found: Plan) -> None:
    """Join the processes of a plan for several devices. Raises `PlanError` unless there are as many."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if distributed.is_available() and distributed.is_initialized():
        started = distributed.get_world_size()
    if started != found.hardware.count:
        raise PlanError(
            f"this plan is for {found.hardware.count} processes, and there are {started}. Start the script so: "
            f"{found.launch}; or choose one device by CUDA_VISIBLE_DEVICES."
        )
    init_distributed(device=found.hardware.device.kind)

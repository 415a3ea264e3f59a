"""What optimizers tell monitors: the norm of the gradients before their step, and when it is made."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .monitor import WATCHED, Monitor, monitor_on


def _before(optimizer: torch.optim.Optimizer, *_: object) -> None:
    # A fused optimizer takes the scale of a GradScaler off itself.
    scale = getattr(optimizer, "grad_scale", None)
    for model, monitor in _trained_by(optimizer):
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if gradients:
            monitor.note_gradients(_norm(gradients) / (1.0 if scale is None else float(scale)))


def _after(optimizer: torch.optim.Optimizer, *_: object) -> None:
    for _model, monitor in _trained_by(optimizer):
        if monitor.noted:
            monitor.close()


def _trained_by(optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Module, Monitor]]:
    """The models whose monitor waits for an optimizer, and of which this one has parameters."""
    waiting = [(model, monitor) for model in list(WATCHED) if (monitor := monitor_on(model)) and monitor.waits]
    if waiting:
        mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for model, monitor in waiting:
            if any(id(parameter) in mine for parameter in model.parameters()):
                yield model, monitor


def _norm(gradients: list[Tensor]) -> float:
    """The norm of gradients, each of which may be spread over ranks; all of those must ask for it."""
    by_mesh: dict[Any, list[Tensor]] = {}
    for one in gradients:
        by_mesh.setdefault(one.device_mesh if isinstance(one, DTensor) else None, []).append(one)
    norms = [torch.nn.utils.get_total_norm(some) for some in by_mesh.values()]
    return math.hypot(*(float(one.full_tensor() if isinstance(one, DTensor) else one) for one in norms))


register_optimizer_step_pre_hook(_before)
register_optimizer_step_post_hook(_after)

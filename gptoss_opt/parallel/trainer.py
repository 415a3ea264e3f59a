"""What transformers' Trainer and accelerate must know of a model that several ranks hold together."""

from __future__ import annotations

import functools
from typing import Any

import accelerate
from accelerate.utils import DistributedType
from torch import nn
from transformers.distributed.configuration_utils import DistributedConfig

from ..core import Journal, mesh_of
from ..model.host import config_paths


def tell_trainer(model: nn.Module, journal: Journal) -> None:
    """Tell the Trainer which ranks share a batch, and that placement and gradients are the model's own affair.

    It asks the model: how many ranks share a batch (`tp_size`), how many have their own (`distributed_config`), and
    whether it must leave the model as it is, neither wrapped in DDP nor moved.
    """
    mesh = mesh_of(model)
    if mesh.tp_size * mesh.dp_size == 1:
        return
    journal.set(model, "", "_tp_size", mesh.tp_size)
    if hasattr(DistributedConfig, "dp_size"):
        journal.set(model, "", "_is_distributed_loading_by_transformers", True)
        for path in config_paths(model):
            settings = DistributedConfig(tp_size=mesh.tp_size, fsdp_size=mesh.dp_size)
            journal.set(model, path, "distributed_config", settings)
    if mesh.tp_size > 1 and mesh.device_type == "cpu":
        _let_cpu_ranks_share_a_batch()


@functools.cache
def _let_cpu_ranks_share_a_batch() -> None:
    """Let accelerate give several CPU processes the same batch.

    It can, but its check of a `ParallelismConfig` lets pass only what it calls devices, which are accelerators.
    """
    config: Any = getattr(accelerate, "ParallelismConfig", None)
    if config is None:  # older versions: the Trainer says itself that it needs a later one
        return
    check = config._validate_accelerator

    @functools.wraps(check)
    def validate(self: Any, accelerator: Any) -> None:
        on_cpu = accelerator.distributed_type == DistributedType.MULTI_CPU
        if not (on_cpu and self.total_size == accelerator.num_processes):
            check(self, accelerator)

    config._validate_accelerator = validate

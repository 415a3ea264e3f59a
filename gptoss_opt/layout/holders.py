"""What else may hold the parameters of a model, in parts that it gathers for each forward."""

from __future__ import annotations

from torch import nn


def under_fsdp(model: nn.Module) -> bool:
    """Whether `fully_shard` was called on the model or a module in it.

    Its parameters look like any between a forward and a backward, so that the modules are asked.
    """
    return any(kind.__name__ == "FSDPModule" for module in model.modules() for kind in type(module).__mro__)


def under_zero(model: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO-3 holds the parameters."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())

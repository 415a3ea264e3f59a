"""How a module finds its low-rank adapters, if it has any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..kernels.low_rank import LowRank

A, B = "lora_A", "lora_B"
ADAPTERS = "_gptoss_opt_adapters"
"""An attribute of adapted modules: their adapters, by what the names of their parameters begin with."""
SWITCH = "_disable_adapters"
"""An attribute of adapted modules, under the name that peft has for it: the `Switch` of all adapters of the model."""


@dataclass
class Switch:
    """Whether a model computes as if it had no adapters. All its adapted modules have the same object."""

    off: bool = False


@dataclass(frozen=True)
class Adapter:
    """How an adapter counts.

    Attributes:
        scale: what its product is multiplied by.
        dropout: the probability with which its inputs are left out while the module is trained.
    """

    scale: float
    dropout: float


def change_of(module: Any, before: str = "") -> LowRank | None:
    """The adapter of a module, as what it holds of it now; None if it has none, or they are off."""
    adapter = module.__dict__.get(ADAPTERS, {}).get(before)
    if adapter is None or module.__dict__[SWITCH].off:
        return None
    # Attributes, not parameters: of a sharded model they are what this rank holds.
    a, b = getattr(module, before + A), getattr(module, before + B)
    return LowRank(a, b, adapter.scale, adapter.dropout if module.training else 0.0)

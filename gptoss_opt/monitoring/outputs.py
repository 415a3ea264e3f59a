"""Where steps are written: a log, JSON lines, or the writers of dashboards that are installed."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from .step import Step

LOGGER = logging.getLogger("gptoss_opt")
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
"""Dashboards, and the package that each needs."""


def why_not(to: str) -> str | None:
    """The reason why steps cannot be written to this, or None.

    Example:
        >>> why_not("log"), why_not("steps.jsonl")
        (None, None)
    """
    if to == "log" or to.endswith(".jsonl"):
        return None
    if to not in PACKAGES:
        known = ", ".join(map(repr, ("log", *PACKAGES)))
        return f"steps cannot be written to {to!r}. Use {known}, or the path of a file that ends with .jsonl."
    if importlib.util.find_spec(PACKAGES[to]) is None:
        return f"{to!r} needs the package {PACKAGES[to]}, which is not installed: pip install {PACKAGES[to]}."
    return None


def write(to: str, step: Step) -> None:
    """Write a step."""
    if to == "log":
        LOGGER.info("%s", step)
    elif to.endswith(".jsonl"):
        Path(to).parent.mkdir(parents=True, exist_ok=True)
        with Path(to).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_valid(step.to_dict()), allow_nan=False) + "\n")
    else:
        _writer(to)(step)


def _valid(value: Any) -> Any:
    """A value as JSON can hold it: numbers that are not finite as text."""
    if isinstance(value, dict):
        return {name: _valid(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_valid(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def named(step: Step) -> dict[str, float]:
    """The numbers of a step by the names that dashboards have them under, beside those of others."""
    return {f"gptoss_opt/{name}": value for name, value in step.numbers().items()}


@cache
def _writer(to: str) -> Callable[[Step], None]:
    if to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        board: Any = SummaryWriter()

        def to_board(step: Step) -> None:
            for name, value in named(step).items():
                board.add_scalar(name, value, step.number)

        return to_board
    module: Any = importlib.import_module(to)
    if to == "wandb":
        return lambda step: module.log(named(step))
    return lambda step: module.log_metrics(named(step), step=step.number)

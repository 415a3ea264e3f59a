"""Evaluating a model with the lm-evaluation-harness, served by a `ContinuousBatcher`.

`lm_eval` is imported when `BatcherLM` is first asked for.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batcher_lm import BatcherLM

__all__ = ["BatcherLM"]


def __getattr__(name: str) -> Any:
    if name != "BatcherLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec("lm_eval") is None:
        raise ImportError("BatcherLM needs the lm-evaluation-harness, which is not installed: pip install lm-eval.")
    from .batcher_lm import BatcherLM

    return BatcherLM

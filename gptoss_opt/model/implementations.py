"""What computes attention and experts, as a config names it."""

from __future__ import annotations

from typing import Any

from .attention import KEY

IMPLEMENTATION = {"attention": "_attn_implementation", "experts": "_experts_implementation"}
"""Where a config names what computes a part."""


def implementation_of(config: Any, part: str) -> str:
    """The backend of ours, or the implementation of transformers', that computes a part.

    Example:
        >>> implementation_of(model.config, "attention")
        'eager'
        >>> implementation_of(with_flash_attention(model, backend="torch").config, "attention")
        'torch'
    """
    return str(getattr(config, IMPLEMENTATION[part])).removeprefix(KEY.format(""))

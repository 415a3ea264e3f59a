"""Stacks as the command line names them: wrappers of this package, each with its default options."""

from __future__ import annotations

from collections.abc import Sequence

import gptoss_opt

KNOWN = [name for name in gptoss_opt.__all__ if name.startswith("with_")]
"""Those that one process can have: what shards a model takes several."""


def named(names: Sequence[str]) -> gptoss_opt.Stack:
    """The stack of these wrappers. Raises `ValueError` on a name that is none.

    Example:
        >>> named(["with_flash_attention"])
        compose(with_flash_attention())
    """
    if unknown := [name for name in names if name not in KNOWN]:
        raise ValueError(f"there is no wrapper {', '.join(map(repr, unknown))}. Known are {', '.join(KNOWN)}.")
    return gptoss_opt.compose(*(getattr(gptoss_opt, name)() for name in names))

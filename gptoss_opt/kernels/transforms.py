"""Derivatives beyond the first backward: which of them only plain operations have."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

FORWARD = "jvp"


def active() -> set[str]:
    """The transforms that a call is under, of torch.func ("grad", "vmap", "jvp") or forward-mode differentiation.

    Example:
        >>> torch.func.vmap(lambda x: x * len(active()))(torch.ones(2))
        tensor([1., 1.])
    """
    if torch.compiler.is_compiling():
        return set()
    stack = torch._C._functorch.get_interpreter_stack() or ()
    found = {interpreter.key().name.lower() for interpreter in stack}
    return found | {FORWARD} if getattr(forward_ad, "_current_level", -1) >= 0 else found


NAMES = {"grad": "torch.func.grad", "vmap": "torch.func.vmap", FORWARD: "forward-mode derivatives (jvp)"}


def refuse(what: str, transforms: set[str]) -> None:
    """Raise `ValueError` if there are any of these transforms."""
    if transforms:
        raise ValueError(
            f"{what} has no rule for {' and '.join(NAMES.get(one, one) for one in sorted(transforms))}: only "
            "backend='reference' is made of plain operations. Apply the wrapper with that."
        )

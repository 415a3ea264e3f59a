"""The gradient of `clamp` where a value equals a limit: what the installed torch gives there, ours give too.

It was 1 up to torch 2.13, and is 0 since. In bfloat16 values do equal the limit of the SwiGLU, 7.
"""

from __future__ import annotations

from functools import cache

import torch


@cache
def passes_at_limits() -> bool:
    """Whether the installed torch lets a gradient through `clamp` where a value equals its limit."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones((), device="cpu", requires_grad=True)
        (gradient,) = torch.autograd.grad(x.clamp(max=1.0), x)
    return bool(gradient)


def edge(limit: float) -> float:
    """The largest float32 whose gradient passes a clamp at `limit`, which for kernels that compute in float32 will do.

    Example:
        >>> edge(7.0) in (7.0, 6.999999523162842)
        True
    """
    return limit if passes_at_limits() else float(torch.nextafter(*torch.tensor([limit, 0.0], dtype=torch.float32)))

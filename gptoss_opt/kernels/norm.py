"""RMS norms on CPUs by the native library: one pass instead of the five or more of torch's operations."""

from __future__ import annotations

import torch
from torch import Tensor

from .direct import is_direct
from .native import DTYPES, NormArguments, library


def is_served(x: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` can compute with these: no gradients, on a CPU."""
    return is_direct(x, weight) and x.dtype in DTYPES and x.numel() > 0 and weight.shape == x.shape[-1:]


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, instruction_set: int | None = None) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dim (Zhang and Sennrich 2019), for what `is_served` says.

    In float32 inside; the result is rounded once.

    Args:
        x: [..., length], bfloat16 or float32.
        weight: [length], in the same dtype.
        eps: what is added to the mean.
        instruction_set: an index of `INSTRUCTION_SETS`, by default the best that this CPU has.

    Example:
        >>> rms_norm(torch.tensor([[3.0, -4.0]]), torch.ones(2), 0.0)
        tensor([[ 0.8485, -1.1314]])
    """
    functions, best, parallel = library()
    rows = x.contiguous()
    out, length = torch.empty_like(rows), x.shape[-1]
    sizes = x.numel() // length, length
    half = x.dtype == torch.bfloat16
    arguments = NormArguments(rows.data_ptr(), weight.data_ptr(), out.data_ptr(), *sizes, eps, half)
    which = best if instruction_set is None else instruction_set
    functions.gptoss_norm(which, arguments, parallel, torch.get_num_threads())
    return out

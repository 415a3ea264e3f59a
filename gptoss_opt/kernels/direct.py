"""Whether an operation may be a native call of its own: outside torch's dispatcher, which autograd and tracing see."""

from __future__ import annotations

import torch
from torch import Tensor

from .tracing import is_traced
from .transforms import active


def is_direct(x: Tensor, *weights: Tensor) -> bool:
    """Whether all are plain tensors of one dtype on the CPU, weights without gaps, and nothing records or lowers them.

    Example:
        >>> is_direct(torch.ones(2)), is_direct(torch.ones(2), torch.ones(2, requires_grad=True))
        (True, False)
    """
    if is_traced(x, *weights) or active() or torch.is_autocast_enabled("cpu"):
        return False
    recorded, dtype = torch.is_grad_enabled(), x.dtype
    for one in (x, *weights):
        if not one.is_cpu or one.dtype != dtype or one.layout != torch.strided or one.is_neg():
            return False
        if recorded and one.requires_grad:
            return False
    return all(one.is_contiguous() and one.data_ptr() for one in weights)

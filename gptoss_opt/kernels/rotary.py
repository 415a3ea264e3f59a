"""Rotary position embeddings on CPUs by the native library: one pass instead of a dozen of torch's operations."""

from __future__ import annotations

import torch
from torch import Tensor

from .direct import is_direct
from .native import DTYPES, RotaryArguments, library


def is_served(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate` can compute with these: no gradients, on a CPU."""
    if not all(map(is_direct, (x, cos, sin))) or not x.dtype == cos.dtype == sin.dtype or x.dtype not in DTYPES:
        return False
    if x.dim() != 4 or not x.numel() or x.stride(3) != 1:
        return False
    batch, _, num_tokens, dim = x.shape
    angles = [(rows, num_tokens, dim // 2) for rows in (1, batch)]
    return dim % 2 == 0 and cos.shape in angles and sin.shape == cos.shape


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, instruction_set: int | None = None) -> Tensor:
    """Heads rotated by the positions of their tokens, for what `is_served` says.

    With `a` and `b` the halves of a head, `[a cos - b sin, b cos + a sin]` (Su et al. 2021, arXiv:2104.09864, with
    halves as pairs). In float32 inside; the result is rounded once.

    Args:
        x: [batch, heads, tokens, head_dim], bfloat16 or float32; the last dim without gaps.
        cos: [batch or 1, tokens, head_dim / 2], in the same dtype; sin likewise.
        instruction_set: an index of `INSTRUCTION_SETS`, by default the best that this CPU has.

    Returns:
        Like x, contiguous.

    Example:
        >>> x, angle = torch.tensor([[[[1.0, 0.0]]]]), torch.full((1, 1, 1), torch.pi / 2)
        >>> rotate(x, angle.cos(), angle.sin()).round()
        tensor([[[[-0., 1.]]]])
    """
    functions, best, parallel = library()
    batch, heads, num_tokens, dim = x.shape
    out, cos, sin = x.new_empty(x.shape), cos.contiguous(), sin.contiguous()
    arguments = RotaryArguments(
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        out.data_ptr(),
        heads,
        num_tokens,
        dim,
        *x.stride()[:3],
        0 if len(cos) == 1 else num_tokens * dim // 2,
        x.dtype == torch.bfloat16,
    )
    which = best if instruction_set is None else instruction_set
    functions.gptoss_rotary(which, arguments, batch, parallel, torch.get_num_threads())
    return out

"""Attention on pages on CUDA through Triton: parts of each sequence's keys side by side, put together afterwards.

The keys of a sequence are cut into parts as in Flash-Decoding (Dao et al. 2023), so that few long sequences fill a GPU
as many short ones do. How many follows from shapes alone, so that a CUDA graph can capture the call.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ...gate import admit
from ...triton import why_not as why_not
from ..paged import Paged

PROGRAMS = 512
"""About how many programs fill a GPU."""

KEYS = 64
"""How many keys a program looks at at a time."""

MIN_KEYS = 256
"""How many keys a part has at least: fewer are not worth a program."""

MIN_TILE = 16
"""How many rows and columns a product takes at least."""


def num_parts(num_rows: int, num_kv_heads: int, num_keys: int) -> int:
    """Into how many parts the keys of each sequence are cut.

    Example:
        >>> num_parts(1, 8, 8192), num_parts(256, 8, 8192), num_parts(1, 8, 100)
        (32, 1, 1)
    """
    wanted = -(-PROGRAMS // max(1, num_rows * num_kv_heads))
    return max(1, min(wanted, num_keys // MIN_KEYS))


def decode(
    q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor, paged: Paged, scale: float, window: int | None
) -> Tensor:
    """Attention of decoding sequences: queries [R, H, D], whose keys are stored already, to [R, H, D].

    Sums in float32.
    """
    num_rows, num_heads, dim = q.shape
    num_kv_heads, page_size = keys.shape[1:3]
    width = paged.block_table.shape[1]
    pages = (len(keys), num_kv_heads, page_size, dim)
    for name, tensor, dtype, shape in (
        ("keys", keys, q.dtype, pages),
        ("values", values, q.dtype, pages),
        ("context_starts", paged.context_starts, torch.int32, (num_rows,)),
        ("context_lens", paged.context_lens, torch.int32, (num_rows,)),
        ("block_table", paged.block_table.contiguous(), torch.int32, (num_rows, width)),
    ):
        admit(name, tensor, dtype, shape, q.device, strided=False)
    seen = width * page_size if window is None else min(width * page_size, window)
    parts = num_parts(num_rows, num_kv_heads, seen)
    sums = torch.empty(num_rows, num_heads, parts, dim, dtype=torch.float32, device=q.device)
    largest, totals = (torch.empty(sums.shape[:-1], dtype=torch.float32, device=q.device) for _ in range(2))
    group = num_heads // num_kv_heads
    with torch.cuda.device_of(q):
        _kernels().decode_kernel[(num_rows, num_kv_heads, parts)](
            q.contiguous(),
            keys,
            values,
            paged.block_table.contiguous(),
            paged.context_starts,
            paged.context_lens,
            sums,
            largest,
            totals,
            width,
            num_kv_heads,
            parts,
            window or 0,
            float(scale),
            GROUP=group,
            DIM=dim,
            PAGE=page_size,
            HEADS=_as_wide_as_a_tile(group),
            DIMS=_as_wide_as_a_tile(dim),
            KEYS=KEYS,
        )
    sink = sinks.to(torch.float32)[:, None]
    maximum = torch.maximum(largest.amax(-1, keepdim=True), sink)
    shares = (largest - maximum).exp()
    total = (totals * shares).sum(-1, keepdim=True) + (sink - maximum).exp()
    return ((sums * (shares / total)[..., None]).sum(-2)).to(q.dtype)


def _as_wide_as_a_tile(number: int) -> int:
    """The smallest power of two that is no less than a number, and that a product takes."""
    return max(MIN_TILE, 1 << (number - 1).bit_length())


def _kernels() -> ModuleType:
    from . import triton_kernels

    return triton_kernels

"""Attention problems: every way in which keys can be hidden from queries."""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_opt.kernels.attention import Visible

BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 16
SCALE = DIM**-0.5
GEOMETRY_20B = (64, 8, 64)
WINDOWS = (None, 1, 5, 64, 200)
LENGTHS = ((1, 1), (1, 40), (7, 7), (33, 33), (300, 300), (150, 400), (9, 170))


def inputs(
    num_queries: int,
    num_keys: int,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    shape: tuple[int, int, int] = (HEADS, KV_HEADS, DIM),
) -> list[Tensor]:
    """q, k, v and sinks, in the memory layouts that a model gives them."""
    heads, kv_heads, dim = shape
    q = torch.randn(BATCH, heads, num_queries, dim)
    k = torch.randn(BATCH, kv_heads, num_keys, dim)
    v = torch.randn(BATCH, num_keys, kv_heads, dim).transpose(1, 2)
    return [x.to(device, dtype) for x in (q, k, v, torch.randn(heads))]


def visibles(num_queries: int, num_keys: int, heads: int = HEADS) -> dict[str, Visible]:
    """Every kind of restriction, by name."""
    third = num_keys // 3
    slots = torch.arange(num_keys)
    kinds = {
        "nothing hidden": Visible(),
        "left padding": Visible(keys=torch.stack([slots >= third, slots >= 0])),
        "right padding": Visible(keys=torch.stack([slots < num_keys - third, slots >= 0])),
        "a row of padding": Visible(keys=torch.stack([slots < 0, slots >= 0])),
        "holes": Visible(keys=torch.rand(BATCH, num_keys) > 0.3),
        "own bool mask": Visible(mask=torch.rand(BATCH, 1, num_queries, num_keys) > 0.5),
        "own mask per head": Visible(mask=torch.rand(1, heads, num_queries, num_keys) > 0.5),
        "own additive mask": Visible(mask=torch.randn(1, 1, num_queries, num_keys)),
        "own mask of infinities": Visible(mask=torch.zeros(1, 1, num_queries, num_keys).fill_(-torch.inf)),
    }
    if num_keys > num_queries:
        kinds["empty slots behind"] = Visible(q_start=torch.tensor((num_keys - num_queries) // 2))
    if num_queries > 4:
        starts = torch.zeros(BATCH, num_queries, dtype=torch.long)
        starts[0, 2:] = 2
        starts[0, num_queries // 2 :] = num_queries // 2
        kinds["packed"] = Visible(starts=starts)
        kinds["packed and padded"] = Visible(starts=starts, keys=(slots < num_keys - 1).expand(BATCH, -1))
    return kinds


PROBLEMS = [
    (num_queries, num_keys, name) for num_queries, num_keys in LENGTHS for name in visibles(num_queries, num_keys)
]

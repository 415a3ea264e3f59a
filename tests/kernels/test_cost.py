"""What attention costs: sliding layers O(n * window) products, and memory that grows linearly, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.harness import peak_memory
from gptoss_opt.kernels.attention import attention
from gptoss_opt.kernels.attention.tiles import BLOCK, Blocks, tiles_of
from gptoss_opt.kernels.attention.visible import Segment

KV_HEADS = 2


def products(num_queries: int, num_keys: int, window: int | None) -> int:
    """How many (query, key) pairs the tiles compute, per query head."""
    total = 0
    for tile in tiles_of(Segment(0, 0, num_queries, 0, num_keys, num_keys - num_queries), window, KV_HEADS):
        if isinstance(tile, Blocks):
            total += tile.count * tile.num_queries * tile.num_keys / KV_HEADS
        else:
            total += (tile.q1 - tile.q0) * (tile.k1 - tile.k0)
    return int(total)


@pytest.mark.parametrize("window", [1, 8, 128])
@pytest.mark.parametrize("length", [300, 1000, 4096, 16384])
def test_sliding_layers_cost_a_window_per_query(length: int, window: int) -> None:
    assert products(length, length, window) <= length * (window + BLOCK)


@pytest.mark.parametrize("window", [None, 100])
def test_a_chunk_against_a_long_cache_never_pays_for_more_than_it_sees(window: int | None) -> None:
    assert products(32, 5000, window) <= 32 * ((window or 5000) + BLOCK)


def forward_and_backward(length: int, window: int | None) -> Callable[[], object]:
    q = torch.randn(1, 32, length, 64, requires_grad=True)
    k, v = (torch.randn(1, KV_HEADS, length, 64, requires_grad=True) for _ in range(2))
    sinks = torch.zeros(32, requires_grad=True)
    # What torch allocates once, on its first use.
    attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], sinks, scale=0.2).sum().backward()
    return lambda: attention(q, k, v, sinks, scale=0.2, window=window).sum().backward()


@pytest.mark.parametrize(("window", "length"), [(None, 2048), (128, 4096)])
def test_memory_is_linear(window: int | None, length: int) -> None:
    short, long = (peak_memory(forward_and_backward, n, window) for n in (length, 2 * length))
    assert long <= 2.2 * short
    # A quarter of a single matrix of scores.
    assert long < 32 * (2 * length) ** 2

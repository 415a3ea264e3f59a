"""Builds the engine that serves a model: how many pages there are, and whether steps are captured."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import nn

from ..core import mesh_of
from ..model import serving
from .batch import Batch, Span
from .cache import Cache, Group
from .engine import Engine
from .graphs import CudaCapture
from .inputs import PagedMemory
from .runner import Runner
from .scheduler import Scheduler

SHARE_OF_CPU = 0.5
SHARE_OF_GPU = 0.9
"""How much of the memory that is free the pages may take."""


def build_engine(
    model: nn.Module,
    *,
    max_num_sequences: int,
    max_batch_tokens: int,
    max_length: int | None,
    kv_memory: int | str,
    page_size: int,
    share_prefixes: bool,
    cuda_graphs: bool,
) -> Engine:
    """The engine of a `ContinuousBatcher`. Raises `ValueError` if `kv_memory` is less than a page per kind of layer."""
    groups = tuple(Group(kind, *found) for kind, found in serving.kinds_of_layers(model).items())
    shape, mesh = serving.key_shape(model), mesh_of(model)
    config: Any = model.config
    max_tokens = min(config.max_position_embeddings, max_length or config.max_position_embeddings)
    bytes_of_page = page_size * shape.num_bytes * max(len(group.layers) for group in groups)

    if shape.device.type != "cuda":
        why_no_graphs: str | None = f"the model is on {shape.device.type}"
    else:
        why_no_graphs = serving.why_not_captured(model) if cuda_graphs else "cuda_graphs=False"

    def cache_of(num_pages: int) -> Cache:
        # And the page that is nobody's.
        return Cache(num_pages + 1, groups, page_size, share=share_prefixes)

    def runner_of(cache: Cache) -> Runner:
        memory = PagedMemory(cache, shape, num_rows=max_num_sequences, max_tokens=max_tokens)
        return Runner(model, memory, None if why_no_graphs else CudaCapture())

    if kv_memory != "auto":
        room = float(kv_memory)
    elif shape.device.type == "cuda":
        step = min(max_batch_tokens, max_tokens)
        probe = -(-step // page_size) * len(groups)
        room = SHARE_OF_GPU * _left_by_a_step(runner_of(cache_of(probe)), step, min(step, max_num_sequences))
    else:
        room = SHARE_OF_CPU * psutil.virtual_memory().available
    max_pages = cache_of(0).max_pages(max_tokens) * max_num_sequences
    num_pages = min(int(room / bytes_of_page), max_pages)
    if mesh is not None:
        num_pages = mesh.broadcast_from_first(num_pages)
    if num_pages < len(groups):
        raise ValueError(
            f"kv_memory of {int(room):,} bytes is less than a page of {page_size} tokens for each kind of layer takes, "
            f"{bytes_of_page * len(groups):,}. Give more, or use a smaller page_size."
        )
    cache = cache_of(num_pages)
    scheduler = Scheduler(cache, max_num_sequences, max_batch_tokens)
    watch = serving.WeightsWatch(model)
    return Engine(scheduler, runner_of(cache), mesh, bytes_of_page, watch, why_no_graphs)


def _left_by_a_step(runner: Runner, num_tokens: int, num_sampled: int) -> int:
    """How many bytes are free on the GPU while a step computes `num_tokens` and samples after `num_sampled` of them."""
    memory, num_tokens = runner.memory, max(num_tokens, 2)  # one alone would be decoding, which is captured
    device, num_pages = memory.block_tables.device, -(-num_tokens // memory.page_size)
    new_pages = [(g, 0, n, 1 + g * num_pages + n) for g in range(len(memory.groups)) for n in range(num_pages)]
    span = Span(row=0, start=0, end=num_tokens, first=0, write_from=0)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    logits, _ = runner.run(Batch([0] * num_tokens, [span], list(range(num_sampled)), new_pages, []))
    logits.float().sort(-1)
    used = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0] - used

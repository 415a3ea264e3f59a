"""An engine for a model: how many pages there are, and what they are of."""

from __future__ import annotations

import psutil
import torch
from torch import nn

from ..model import serving
from .batch import Batch, Part
from .cache import Cache, Group
from .engine import Engine
from .graphs import CudaCapture
from .runner import Runner
from .scheduler import Scheduler

SHARE_OF_CPU = 0.5
SHARE_OF_GPU = 0.9
"""Of the memory that is free, what pages may take."""


def build_engine(
    model: nn.Module,
    *,
    max_num_sequences: int,
    max_batch_tokens: int,
    kv_memory: int | str,
    page_size: int,
    share_prefixes: bool,
    cuda_graphs: bool,
) -> Engine:
    """An engine whose pages take so much memory. Raises `ValueError` if that is too little for anything."""
    groups = tuple(Group(kind, *found) for kind, found in serving.kinds_of_layers(model).items())
    shape, mesh = serving.key_shape(model), serving.model_mesh(model)
    bytes_of_page = page_size * shape.num_bytes * max(len(group.layers) for group in groups)
    most = Cache(1, groups, page_size).most_pages(serving.most_tokens(model)) * max_num_sequences

    if shape.device.type != "cuda":
        why_no_graphs: str | None = f"the model is on {shape.device.type}"
    else:
        why_no_graphs = serving.why_not_captured(model) if cuda_graphs else "cuda_graphs=False"

    def runner_of(num_pages: int) -> Runner:
        return Runner(
            model,
            groups,
            shape,
            num_pages=num_pages + 1,  # and the one that is nobody's
            page_size=page_size,
            max_num_sequences=max_num_sequences,
            max_tokens=serving.most_tokens(model),
            capture=None if why_no_graphs else CudaCapture(),
        )

    if kv_memory != "auto":
        room = float(kv_memory)
    elif shape.device.type == "cuda":
        step = min(max_batch_tokens, serving.most_tokens(model))
        room = SHARE_OF_GPU * _left_by_a_step(
            runner_of(-(-step // page_size) * len(groups)), step, min(step, max_num_sequences)
        )
    else:
        room = SHARE_OF_CPU * psutil.virtual_memory().available
    num_pages = min(int(room / bytes_of_page), most)
    if mesh is not None:
        num_pages = mesh.broadcast_from_first(num_pages)
    if num_pages < len(groups):
        raise ValueError(
            f"kv_memory of {int(room):,} bytes is less than a page of {page_size} tokens for each kind of layer takes, "
            f"{bytes_of_page * len(groups):,}. Give more, or use a smaller page_size."
        )
    cache = Cache(num_pages + 1, groups, page_size, share=share_prefixes)
    scheduler = Scheduler(cache, max_num_sequences, max_batch_tokens)
    return Engine(scheduler, runner_of(num_pages), mesh, bytes_of_page=bytes_of_page, why_no_graphs=why_no_graphs)


def _left_by_a_step(runner: Runner, num_tokens: int, num_sampled: int) -> int:
    """Bytes that are free on the GPU while a step of so many tokens is computed, and so many are sampled."""
    num_pages, groups = -(-num_tokens // runner.tables.page_size), range(len(runner.groups))
    told = tuple(tuple((0, place, 1 + g * num_pages + place) for place in range(num_pages)) for g in groups)
    part = Part(row=0, start=0, tokens=(0,) * num_tokens, first=0, write_from=0)
    torch.cuda.reset_peak_memory_stats(runner.tables.device)
    before = torch.cuda.memory_allocated(runner.tables.device)
    logits = runner.run(Batch((), (part,), tuple(range(num_sampled)), told))
    logits.float().sort(-1)
    used = torch.cuda.max_memory_allocated(runner.tables.device) - before
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(runner.tables.device)[0] - used

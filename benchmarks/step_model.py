"""A model of the time of a decoding step on several GPUs: bytes over bandwidth, and a latency for each collective.

    time = bytes of weights that a rank reads / memory bandwidth
         + for each collective: latency + bytes it sends / link bandwidth

The bytes come from the layout, the collectives from how ranks meet; `benchmarks.parallel` checks both against what it
counts on a real model. Reading the cache of keys and values, and the time of kernels to start, are left out.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GptOssConfig, GptOssForCausalLM

from gptoss_opt import compose, shard_experts, shard_tensor_parallel, with_mxfp4_experts
from gptoss_opt.distributed import split
from gptoss_opt.extend import Layout
from gptoss_opt.model.build import RELEASED as RELEASED

DRAWS = 2000


@dataclass(frozen=True)
class Gpu:
    """A GPU and how it is linked to its neighbours.

    Attributes:
        memory: bytes.
        bandwidth: of memory, bytes/s, by its data sheet.
        link: bytes/s that one GPU sends to the others, by its data sheet.
        latency: seconds of one small all-reduce between neighbours; NCCL over NVLink takes 10 to 20 microseconds.
    """

    name: str
    memory: float
    bandwidth: float
    link: float
    latency: float


GPUS = (
    Gpu("A100 80GB SXM", 80e9, 2.04e12, 300e9, 15e-6),
    Gpu("H100 SXM", 80e9, 3.35e12, 450e9, 12e-6),
    Gpu("H200 SXM", 141e9, 4.8e12, 450e9, 12e-6),
    Gpu("L40S (PCIe 4)", 48e9, 0.864e12, 32e9, 25e-6),
)


@dataclass(frozen=True)
class Step:
    """Decoding one token for each of `batch` sequences on `degree` ranks."""

    degree: int
    batch: int
    packed: bool


@dataclass(frozen=True)
class Counts:
    """The collectives of a forward, and the bytes that a rank sends in them (2 (n - 1) / n of an all-reduce)."""

    all_reduces: int
    all_gathers: int
    sent: float


def counts_of(config: GptOssConfig, degree: int, tokens: int, logits: int, itemsize: int = 2) -> Counts:
    """Of `shard_tensor_parallel` and `shard_experts` on the same ranks."""
    all_reduces = 2 * config.num_hidden_layers + 1
    reduced = 2 * (degree - 1) / degree * tokens * config.hidden_size * itemsize
    widest = len(split(config.vocab_size, degree)[0])
    return Counts(all_reduces, 1, all_reduces * reduced + (degree - 1) * logits * widest * itemsize)


@functools.cache
def _model(layers: int, experts: int) -> Any:
    with torch.device("meta"):
        model: Any = GptOssForCausalLM(GptOssConfig(num_hidden_layers=layers, num_local_experts=experts))
    return model.to(torch.bfloat16)


def layout_on(config: GptOssConfig, degree: int, *, packed: bool) -> Layout:
    """The layout on some ranks: attention and vocabulary by tensor, experts by expert parallelism."""
    both = compose(shard_tensor_parallel(degree=degree), shard_experts(degree=degree))
    stack = compose(both, with_mxfp4_experts()) if packed else both
    return stack.layout(_model(config.num_hidden_layers, config.num_local_experts))


def bytes_held(config: GptOssConfig, degree: int, *, packed: bool) -> int:
    """The bytes of parameters on the fullest rank."""
    return layout_on(config, degree, packed=packed).max_bytes()


def bytes_read(config: GptOssConfig, step: Step) -> float:
    """The bytes of weights that the slowest rank reads in a step: of the experts, those that any token goes to."""
    layout = layout_on(config, step.degree, packed=step.packed)
    first = {axis.name: 0 for axis in layout.axes}
    experts = others = 0
    for name in layout:
        count = layout.form(name).num_bytes(first)
        if ".experts." in name:
            experts += count
        elif "embed_tokens" not in name:
            others += count
    here = len(split(config.num_local_experts, step.degree)[0])
    return others + experts * _hit(config.num_local_experts, config.num_experts_per_tok, step) / here


@functools.cache
def _hit(num_experts: int, top_k: int, step: Step) -> float:
    """How many experts of the busiest rank are hit, on average over draws of routes that are all alike likely."""
    generator = torch.Generator().manual_seed(0)
    bounds = [part.start for part in split(num_experts, step.degree)[1:]]
    total = 0.0
    for _ in range(DRAWS):
        routes = torch.rand(step.batch, num_experts, generator=generator).topk(top_k).indices.unique()
        ranks = torch.bucketize(routes, torch.tensor(bounds, dtype=torch.int64), right=True)
        total += float(ranks.bincount().max())
    return total / DRAWS


def step_time(config: GptOssConfig, gpu: Gpu, step: Step) -> dict[str, Any]:
    """Seconds of reading weights and of communication, and whether the weights fit at all (in 90 % of the memory)."""
    counts = counts_of(config, step.degree, step.batch, step.batch)
    num_collectives = counts.all_reduces + counts.all_gathers
    communication = num_collectives * gpu.latency + counts.sent / gpu.link if step.degree > 1 else 0.0
    weights = bytes_read(config, step) / gpu.bandwidth
    held = bytes_held(config, step.degree, packed=step.packed)
    return {"weights": weights, "communication": communication, "held": held, "fits": held < 0.9 * gpu.memory}

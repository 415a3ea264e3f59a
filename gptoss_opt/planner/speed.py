"""How fast a machine does some work, from rooflines (Williams et al. 2009): bytes over bandwidth, operations over rate.

    decoding = bytes of weights, and of keys and values, that a step reads / bandwidth, and what collectives take
    prompts  = 2 operations for each weight that a token meets, and those of attention / rate of products
    training = the same, twice for frozen weights and three times for trained ones, once more if layers are checkpointed

Kernels reach a part of what data sheets say: `REACHED`, as measured by this package's benchmarks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..distributed.mesh import NEIGHBOURS
from .hardware import Hardware
from .parameters import Parameters
from .workload import Workload


class Reached(NamedTuple):
    """Which part of bandwidth and of the rate of products kernels reach, and how long starting a layer takes."""

    bandwidth: float
    flops: float
    layer: float


REACHED = {"cpu": Reached(0.72, 0.70, 1.5e-4), "cuda": Reached(0.45, 0.40, 5e-4)}
"""On a CPU by `python -m benchmarks whole`; on a GPU by the products of packed experts on an H100 (see the benchmarks'
README). How long starting a layer's kernels takes there is an estimate: about 20 of them, of 25 microseconds each."""
ALL_OF_IT = Reached(1.0, 1.0, 0.0)
"""What a machine allows at most."""
REPLAYED = 0.1
"""The part of that which is left where `ContinuousBatcher` replays steps as CUDA graphs."""
LATENCY, NETWORK_LATENCY = 12e-6, 30e-6
"""Seconds of one small all-reduce, between neighbours and over a network."""


@dataclass(frozen=True)
class Rate:
    """Tokens a second, and what bounds them."""

    tokens_per_second: float
    bound: str

    def __str__(self) -> str:
        digits = 0 if self.tokens_per_second >= 100 else 1
        return f"{self.tokens_per_second:,.{digits}f} tokens/s, bound by {self.bound}"


def speed_of(
    config: Any, held: Parameters, work: Workload, hardware: Hardware, reached: Reached | None = None
) -> dict[str, Rate]:
    """Rates by what is done: "decode" and "prefill", or "training"; of all replicas of the model together.

    Args:
        config: of the model.
        held: its parameters on the fullest rank.
        work: what is done.
        hardware: by what.
        reached: which part of the device's rates is reached; what this package's kernels do, if left out.

    Example:
        >>> from gptoss_opt import compose
        >>> from gptoss_opt.planner import described
        >>> from gptoss_opt.planner.parameters import parameters_of
        >>> held = parameters_of(model, compose())
        >>> print(speed_of(model.config, held, Workload(), described("1xH100"))["decode"].bound)
        starting kernels
    """
    reached = reached or REACHED[hardware.device.kind]
    many = _many(config, held, work, hardware, reached)
    if work.trains:
        return {"training": many}
    return {"decode": _decode(config, held, work, hardware, reached), "prefill": many}


def _decode(config: Any, held: Parameters, work: Workload, hardware: Hardware, reached: Reached) -> Rate:
    device = hardware.device
    experts = held.weights.get("experts", 0)
    embedding = round(config.vocab_size * held.words) * config.hidden_size * 2
    # Every token of a batch meets its own experts.
    met = 1 - (1 - config.num_experts_per_tok / config.num_local_experts) ** work.batch
    keys = 2 * config.num_key_value_heads * held.heads * config.head_dim * 2
    seen = sum(
        min(work.context, config.sliding_window) if kind == "sliding_attention" else work.context
        for kind in config.layer_types
    )
    read = held.num_bytes - embedding - experts * (1 - met) + work.batch * seen * keys / 2
    times = {
        "memory bandwidth": read / (device.bandwidth * reached.bandwidth),
        "products": work.batch * _operations(config, held, 1, with_head=True) / (device.flops * reached.flops),
    }
    meeting = _collectives(config, held, work.batch, hardware)
    starting = reached.layer * config.num_hidden_layers * (REPLAYED if work.task == "serve" else 1)
    bound = max(times, key=lambda name: times[name])
    seconds = times[bound] + meeting
    if meeting > times[bound]:
        bound = "collectives"
    if starting > seconds:
        seconds, bound = starting, "starting kernels"
    return Rate(hardware.count // held.ranks * work.batch / seconds, bound)


def _many(config: Any, held: Parameters, work: Workload, hardware: Hardware, reached: Reached) -> Rate:
    """Prompts, or training: many tokens at once."""
    device, replicas = hardware.device, hardware.count // held.ranks
    passes = 1 if not work.trains else (3 if work.task == "full" else 2) + work.checkpointing
    operations = work.tokens * passes * _operations(config, held, work.context, with_head=work.trains)
    times = {
        "products": operations / (device.flops * reached.flops),
        "memory bandwidth": passes * held.num_bytes / (device.bandwidth * reached.bandwidth),
        "collectives": passes * _collectives(config, held, work.tokens, hardware),
    }
    bound = max(times, key=lambda name: times[name])
    seconds = max(times["products"], times["memory bandwidth"]) + times["collectives"]
    return Rate(replicas * work.tokens / seconds, bound)


def _operations(config: Any, held: Parameters, context: int, *, with_head: bool) -> float:
    """Operations of a token's forward on the fullest rank, at half of a context on average."""
    hidden, heads = config.hidden_size, config.num_attention_heads * held.heads
    attention = hidden * config.head_dim * 2 * (heads + config.num_key_value_heads * held.heads)
    experts = config.num_experts_per_tok * 3 * hidden * config.intermediate_size * held.inner * held.experts
    seen = sum(
        min(context / 2, config.sliding_window) if kind == "sliding_attention" else context / 2
        for kind in config.layer_types
    )
    head = config.vocab_size * held.words * hidden
    layers = config.num_hidden_layers * (attention + experts) + 2 * heads * config.head_dim * seen
    # A prompt needs the logits after its last token alone.
    return float(2 * (layers + head * with_head))


def _collectives(config: Any, held: Parameters, tokens: int, hardware: Hardware) -> float:
    """Seconds of the all-reduces of a forward, over one axis after the other."""
    return sum(_all_reduces(config, axis, ranks, tokens, hardware) for axis, ranks in held.axes.items())


def _all_reduces(config: Any, axis: str, ranks: int, tokens: int, hardware: Hardware) -> float:
    """Seconds of the all-reduces over one axis: two a layer; over one of experts alone, beside neighbours, one."""
    of_experts = axis != NEIGHBOURS
    over_network = ranks > hardware.per_node or (of_experts and hardware.nodes > 1)
    link = hardware.network if over_network else hardware.device.link
    sent = 2 * (ranks - 1) / ranks * tokens * config.hidden_size * 2
    latency = NETWORK_LATENCY if over_network else LATENCY
    count = config.num_hidden_layers if of_experts else 2 * config.num_hidden_layers + 1
    return float(count * (latency + sent / link))
